"""`python -m awq_onnx` is the command `awq-onnx`."""

from awq_onnx.cli import main

if __name__ == "__main__":
    main()
