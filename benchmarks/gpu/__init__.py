"""What holds on a GPU, and how fast it is there, in one command of ten minutes: `python -m benchmarks.gpu`.

It needs PyTorch with CUDA (2.11 or later), transformers, pyarrow and pydantic; no Ray and no vLLM.
"""
