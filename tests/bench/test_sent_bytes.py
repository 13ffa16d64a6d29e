"""What a rank sends to others is counted."""
import torch
import torch.distributed as dist

from moe_xe.bench.sent_bytes import SentBytes
from tests.distributed.processes import ranks

_c10d = torch.ops._c10d_functional


def exchanged(rank, columns):
    """3 rows to itself and 2 to the other rank; then none at all; what is sent later, or gathered, does not count."""
    def exchange(rows):
        message = torch.full((sum(rows), columns), float(rank))
        return _c10d.wait_tensor(_c10d.all_to_all_single(message, rows, rows, dist.group.WORLD.group_name))

    with SentBytes(rank) as sent:
        received = exchange([3, 2] if rank == 0 else [2, 3])
        exchange([0, 0])
        _c10d.wait_tensor(_c10d.all_gather_into_tensor(torch.ones(7), 2, dist.group.WORLD.group_name))
    exchange([1, 1])
    return sent.number, received[:, 0].tolist()


def test_bytes():
    assert ranks(2).run(exchanged, 5) == [(2 * 5 * 4, [0.0] * 3 + [1.0] * 2), (2 * 5 * 4, [0.0] * 2 + [1.0] * 3)]
