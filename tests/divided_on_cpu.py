"""A worker of a launched training whose GPUs are this machine's processors; run by test_training_divided.py through torchrun.

Accelerate divides a model on GPUs only: it takes FSDP on a CPU for plain DDP. Told that gloo's processes are GPUs, it runs its own code, PyTorch's and DeepSpeed's as they stand.
"""

import os
import sys

os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}

import transformers.training_args
from accelerate.state import DistributedType, PartialState

from medibuddy.training.worker import main

transformers.training_args.is_torch_bf16_gpu_available = lambda *args: True  # DeepSpeed must not be told that it is on a CPU, and then bf16 is asked of a GPU
PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
