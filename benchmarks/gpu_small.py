"""Small calls that launch every kernel, to be run under compute-sanitizer."""

import torch

import lora_kernels as lk
from lora_kernels.ops._low_rank import lora_add_

for dtype in (torch.bfloat16, torch.float32):
    for M in (5, 300):
        make = lambda *size: torch.randn(size, device="cuda", dtype=dtype, requires_grad=True)  # noqa: B023, E731
        x, A, B = make(M, 100), (make(3, 9, 100), make(3, 9, 100)), (make(3, 70, 9), make(3, 33, 9))
        ids = torch.randint(-1, 3, (M,), device="cuda")
        ranks = torch.tensor([9, 0, 4], dtype=torch.int32, device="cuda")
        lk.multi_lora(x, A, B, ids, ranks=ranks).float().sum().backward()
        lk.multi_lora(x, make(3, 40, 100), make(3, 70, 40), ids).float().sum().backward()
        listed = [make(r, 100) for r in (8, 3, 9)], [make(70, r) for r in (8, 3, 9)]
        lk.multi_lora(x, *listed, ids).float().sum().backward()
        weights = torch.rand(M, 2, device="cuda", requires_grad=True)
        pairs = torch.randint(-1, 3, (M, 2), device="cuda")
        lk.multi_lora(x, A[0], B[0], pairs, weights=weights).float().sum().backward()
        for R in (9, 40, 150):
            W, a, b = make(70, 100).detach(), make(R, 100), make(70, R)
            more = {"bias": make(70), "dropout": 0.5, "training": True}
            lk.lora_linear(x, W, a, b, **more).float().sum().backward()
            for p in (0.0, 0.5):
                lk.lora_linear(x, W, a, b, **{**more, "dropout": p}, magnitude=make(70)).float().sum().backward()
        with torch.no_grad():
            plan, y = lk.BatchPlan.from_ids(ids, 3), torch.zeros(M, 103, device="cuda", dtype=dtype)
            for _ in range(2):
                lk.bgmv(y, x, A, B, plan)
                lk.bgmv(y, x, make(3, 18, 100), B, plan, ranks=ranks)  # packed
                plan.update_(ids.flip(0), order=torch.arange(M, device="cuda").flip(0))
        if "cuda" not in lora_add_.backends():
            continue
        with torch.no_grad(), lk.backend("cuda"):
            lk.bgmv(y, x, A, B, ids, ranks=ranks)
            lk.bgmv(y, x, make(3, 18, 100), B, plan, ranks=ranks)
            lk.bgmv(y[:, :70], x, *listed, ids)
            lk.bgmv(y[:, :70], x, A[0], B[0], pairs, weights=weights)
            torch.ops.lora_kernels_C.set_clusters(True)
            lk.bgmv(y, x, A, B, ids, ranks=ranks)
            torch.ops.lora_kernels_C.set_clusters(False)
            lk.bgmv(y[:, :64], make(M, 4608), make(3, 16, 4608), make(3, 64, 16), ids)
    for length in (96, 256, 344, 640, 5376):
        for transpose in (False, True):
            lk.wht(torch.randn(5, length + 1, device="cuda", dtype=dtype)[:, 1:], transpose=transpose)
            lk.wht(torch.randn(3, length, device="cuda", dtype=dtype), transpose=transpose)
    for length in (7, 96, 344, 1069, 5376):
        for function in (lk.dct, lk.idct, lk.dht, lk.haar, lk.ihaar):
            function(torch.randn(5, length + 1, device="cuda", dtype=dtype)[:, 1:])
            function(torch.randn(3, length, device="cuda", dtype=dtype))
torch.cuda.synchronize()
