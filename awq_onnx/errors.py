"""What can go wrong, one class per cause, each with the exit code of the command.

    AwqOnnxError                    1   (never raised itself)
    ├── TooFarError                 1   `awq-onnx compare`: the models are further apart than was allowed
    ├── RecipeError                 2   an option has a value that cannot work
    ├── ModelError                  3   the model cannot be read, or cannot be quantised
    │   ├── ModelFileError          3   missing, not ONNX, truncated, external data missing or short
    │   ├── AlreadyQuantizedError   3   its weights are 4-bit or 8-bit already
    │   ├── NothingToQuantizeError  3   it has no MatMul that could be quantised
    │   ├── WeightError             3   a weight holds NaN or Inf
    │   └── DifferentModelsError    3   two models that cannot be compared: other inputs, outputs or tokens
    ├── ReportFileError             3   what a page is to be made of is no report, and no model of awq-onnx
    ├── OutputError                 4   the output exists, is the input, or cannot be written; a full disk
    ├── CalibrationError            5   the calibration data do not fit the model
    ├── MissingPackageError         6   an optional package is needed
    ├── RuntimeFailedError          7   onnxruntime could not run the model, or the result
    └── InternalError               8   a fault of awq-onnx: please report it

A `KeyboardInterrupt` ends the command with 130. Every message says what is wrong, where, and what to do.
"""

from __future__ import annotations

__all__ = [
    "AlreadyQuantizedError",
    "AwqOnnxError",
    "CalibrationError",
    "DifferentModelsError",
    "InternalError",
    "MissingPackageError",
    "ModelError",
    "ModelFileError",
    "NothingToQuantizeError",
    "OutputError",
    "RecipeError",
    "ReportFileError",
    "RuntimeFailedError",
    "TooFarError",
    "WeightError",
]


class AwqOnnxError(Exception):
    """Every error that a user can cause or mend; its text is one clear sentence."""

    exit_code = 1


class TooFarError(AwqOnnxError):
    pass


class RecipeError(AwqOnnxError, ValueError):
    exit_code = 2


class ModelError(AwqOnnxError):
    exit_code = 3


class ModelFileError(ModelError):
    pass


class AlreadyQuantizedError(ModelError):
    pass


class NothingToQuantizeError(ModelError):
    pass


class WeightError(ModelError):
    pass


class DifferentModelsError(ModelError):
    pass


class ReportFileError(AwqOnnxError):
    exit_code = 3


class OutputError(AwqOnnxError):
    exit_code = 4


class CalibrationError(AwqOnnxError):
    exit_code = 5


class MissingPackageError(AwqOnnxError, ImportError):
    exit_code = 6


class RuntimeFailedError(AwqOnnxError):
    exit_code = 7


class InternalError(AwqOnnxError):
    exit_code = 8
