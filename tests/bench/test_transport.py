"""What is sent is counted, and a link can be slow."""
import time

import torch
import torch.distributed as dist

from moe_xe.bench.transport import Transport
from tests.distributed.processes import ranks

_c10d = torch.ops._c10d_functional


def start(rank, rows, columns):
    """To the other rank and to itself, so many rows each."""
    message = torch.full((2 * rows, columns), float(rank))
    return _c10d.all_to_all_single(message, [rows, rows], [rows, rows], dist.group.WORLD.group_name)


def exchanged(rank, seconds_per_byte):
    dist.barrier()
    begin = time.perf_counter()
    with Transport(rank, seconds_per_byte) as transport:
        first, second, empty = start(rank, 3, 5), start(rank, 2, 5), start(rank, 0, 5)
        time.sleep(80 * seconds_per_byte)
        times = []
        for received in (first, second, empty):
            received = _c10d.wait_tensor(received)
            times.append(time.perf_counter() - begin)
            assert received.tolist() == [[float(sender)] * 5 for sender in (0, 1) for _ in range(len(received) // 2)]
    return transport.sent_bytes, times


def test_what_is_sent():
    assert [sent for sent, _ in ranks(2).run(exchanged, 0.0)] == [100, 100]


def test_a_slow_link_takes_one_exchange_after_another():
    """60 and 40 bytes, at 3 ms each; what the rank does meanwhile, for 240 ms, adds nothing."""
    for _, (first, second, empty) in ranks(2).run(exchanged, 3e-3):
        assert 0.24 <= first and 0.3 <= second <= empty < 0.3 + 0.2     # on a busy machine


def test_others_are_left_alone():
    with Transport(0, 1.0) as transport:
        assert torch.ones(3).sum() == 3
    assert transport.sent_bytes == 0
