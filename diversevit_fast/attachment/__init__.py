"""See and change the attention of a model somebody else wrote, without writing to it."""
