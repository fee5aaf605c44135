"""What an error in a layer costs the logits: told from a sample of the vocabulary, and from all of it, side by side.

    python benchmarks/sampled_vocabulary.py [--sample-size 4096]

Noise in every layer of SmolLM2, one after the other, on 4 x 64 tokens of held-out text. Told is the ratio of the two
losses over the layers, and the time that each took.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from common import held_out_text, smollm2

from awq_onnx import sensitivity, vocabulary
from awq_onnx.calibrate.feeds import complete, signature
from awq_onnx.passes.sites import survey
from awq_onnx.store import open_model


def main() -> None:
    parser = argparse.ArgumentParser(description="Losses from a sample of the vocabulary against those from all of it.")
    parser.add_argument("--sample-size", type=int, default=vocabulary.SAMPLE_SIZE, help="tokens (%(default)s)")
    sample_size = parser.parse_args().sample_size
    model = smollm2()
    with open_model(model) as opened:
        wanted = signature(opened.model.graph)
        window = complete(wanted, {"input_ids": held_out_text(model, 4, sensitivity.TOKENS)})
        places = [site.output.name or "" for site in survey(opened.model).sites]
        found = []
        for size in (sample_size, wanted.vocabulary or 1 << 30):  # as large as the vocabulary: all of it
            vocabulary.SAMPLE_SIZE = size
            start = time.perf_counter()
            losses = sensitivity.measure(opened, places, {}, [window], ["logits"], wanted)
            found.append((np.array([losses[place] for place in places]), time.perf_counter() - start))
    (sampled, seconds), (exact, seconds_of_all) = found
    ratios = sampled / exact
    print(f"{len(places)} layers, {sample_size} tokens of the vocabulary against all of it")
    print(f"ratio of losses: {ratios.mean():.4f} +-{ratios.std():.4f}, {ratios.min():.3f} to {ratios.max():.3f}")
    print(f"seconds: {seconds:.1f} against {seconds_of_all:.1f}")


if __name__ == "__main__":
    main()
