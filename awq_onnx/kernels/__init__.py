"""Arrays in, arrays out: executing `com.microsoft::MatMulNBits`. reference.py is the specification of every kernel."""
