"""Data and expert parallelism: the only package besides launch/ that uses torch.distributed."""
