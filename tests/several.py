"""What tests run in processes of their own, without the run-time type checks of this suite."""
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mythos_core import OpenMythos
from mythos_core.model.config import tutorial_config


def one_of_two(rank: int, folder: Path):
    """A step of data-parallel training; the ranks have other strings, and other wishes to halt."""
    dist.init_process_group("gloo", init_method=(folder / "meet").as_uri(), rank=rank, world_size=2)
    torch.manual_seed(0)
    model, loops = OpenMythos(tutorial_config("gqa", vocab_size=17, balance_rate=0.01)), []
    torch.nn.init.constant_(model.recurrent.act.halt.bias, 9.0 if rank else -9.0)
    ids = torch.randint(17, (2, 6), generator=torch.Generator().manual_seed(rank))
    parallel = DistributedDataParallel(model, init_sync=False)
    parallel(ids, 4, observer=lambda record: loops.append(record.loop)).sum().backward()
    moe = model.recurrent.block.ffn
    own = moe.load.clone()
    moe.balance()
    torch.save([loops, own, moe.router_bias], folder / f"{rank}.pt")
    dist.destroy_process_group()


def one_graph(attn: str, **changes):
    """Whether the compiler makes one graph of a model; traced only, since compiling takes long."""
    model = OpenMythos(tutorial_config(attn, **changes)).eval()
    ids = torch.randint(17, (2, 10))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(ids, 3), model(ids, 3), atol=1e-5)


if __name__ == "__main__":
    if sys.argv[1:]:
        torch.multiprocessing.spawn(one_of_two, (Path(sys.argv[1]),), nprocs=2)
    else:
        one_graph("gqa")
        one_graph("mla", halting="none", n_experts=64, window=4)
        one_graph("gqa", strict=True, halting="settled", loop_embedding=False, lora_rank=0)
