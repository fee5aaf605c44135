"""Build MGM as ONNX: a trained GPT-2 whose words are genera of microbes, ranked as in a sample of a microbiome.

    python models/gpt2.py [FOLDER]

Needs `pip install awq-onnx[cpu,export]` and the weights: `pip install --no-deps microformer-mgm==0.5.8` (its own
dependencies are for training). Writes FOLDER with model.onnx (fp32, text-generation-with-past, exported by
optimum), config, tokenizer and samples.npz; without FOLDER into the cache. What it is: models/README.md.
"""

# transformers is half typed:
# mypy: allow-untyped-calls

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))  # not there where a script is loaded by its path
from model_building import build_and_tell, build_once, cached_folder, command_line, first_output, package_folder

PACKAGE = ("mgm", "microformer-mgm==0.5.8")
SPECIAL_TOKENS = ["<pad>", "<mask>", "<bos>", "<eos>"]
SAMPLE_LENGTH, TRIES, SEED = 64, 320, 20231  # two tries of five get that long


def build(folder: Path | None = None) -> Path:
    """Build the model into `folder` unless it is there already; returns the folder."""
    return build_once(folder or cached_folder("mgm-gpt2-fp32"), _build_into)


def _build_into(folder: Path) -> None:
    from optimum.exporters.onnx import main_export
    from transformers import AutoModelForCausalLM

    resources = package_folder(*PACKAGE) / "resources"
    model = AutoModelForCausalLM.from_pretrained(resources / "general_model", dtype="float32")
    checkpoint = folder / "checkpoint"
    model.save_pretrained(checkpoint)
    _tokenizer(resources).save_pretrained(checkpoint)
    main_export(str(checkpoint), folder, task="text-generation-with-past", dtype="fp32", do_validation=False)
    shutil.rmtree(checkpoint)

    samples = _samples(model)
    _check(model, folder, samples[:4])
    np.savez_compressed(folder / "samples.npz", input_ids=samples)


def _tokenizer(resources: Path) -> Any:
    """Names of genera with spaces between: the package has the same words, as a pickle of its own class."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    with (resources / "phylogeny.csv").open(newline="") as table:
        genera = [row[0] for row in csv.reader(table)][1:]
    vocabulary = {word: index for index, word in enumerate(SPECIAL_TOKENS + genera)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<mask>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bounds = [(word, vocabulary[word]) for word in ("<bos>", "<eos>")]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=bounds)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", mask_token="<mask>", bos_token="<bos>", eos_token="<eos>"
    )


def _samples(model: Any) -> Any:
    """Token ids (samples, SAMPLE_LENGTH), drawn from the model itself: the package has no data."""
    import torch

    torch.manual_seed(SEED)
    start = torch.full((TRIES, 1), SPECIAL_TOKENS.index("<bos>"))
    drawn = model.generate(
        start, attention_mask=torch.ones_like(start), max_length=SAMPLE_LENGTH, do_sample=True, top_k=0
    )
    return drawn[(drawn >= len(SPECIAL_TOKENS))[:, 1:].all(dim=1)].numpy()  # those that did not end before


def _check(model: Any, folder: Path, input_ids: Any) -> None:
    import torch

    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(input_ids)).logits.numpy()
    difference = float(np.abs(first_output(folder, input_ids) - expected).max())
    assert difference < 1e-3, f"onnxruntime and torch differ by {difference}"


def main() -> None:
    arguments = command_line("Build MGM, a GPT-2 of microbes, as ONNX (fp32).").parse_args()
    build_and_tell(lambda: build(arguments.folder), arguments.print_path)


if __name__ == "__main__":
    main()
