"""Everything worth measuring on a GPU that is at hand for minutes: kernel tests, device and host times, steps."""
