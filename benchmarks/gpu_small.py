"""One small call of every ``low_rank`` kernel, to be run under compute-sanitizer."""

import torch

import lora_kernels as lk

for dtype in (torch.bfloat16, torch.float32):
    for M in (5, 300):
        x = torch.randn(M, 100, device="cuda", dtype=dtype, requires_grad=True)
        A = torch.randn(3, 9, 100, device="cuda", dtype=dtype, requires_grad=True)
        B = torch.randn(3, 70, 9, device="cuda", dtype=dtype, requires_grad=True)
        ids = torch.randint(-1, 3, (M,), device="cuda")
        ranks = torch.tensor([9, 0, 4], dtype=torch.int32, device="cuda")
        lk.multi_lora(x, A, B, ids, ranks=ranks).float().sum().backward()
        with torch.no_grad():
            lk.bgmv(torch.zeros(M, 70, device="cuda", dtype=dtype), x, A, B, lk.BatchPlan.from_ids(ids, 3))
torch.cuda.synchronize()
