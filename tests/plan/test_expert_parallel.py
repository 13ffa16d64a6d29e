"""The predicted time of a layer over several ranks: bytes, overlap, and what one rank has."""
from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_xe.bench.predictions import Layers
from moe_xe.bench.workloads import MODELS, Model, routed_rows
from moe_xe.plan.block.cost import BlockShape, predict_block
from moe_xe.plan.block.expert_parallel import chunk_seconds, pipelined, predict_layer, share_of_tokens
from moe_xe.plan.model.devices import RECORDS, record_named
from moe_xe.plan.model.links import LINKS, NETWORKS, exchange_seconds
from moe_xe.plan.problem import Dtype, WeightLayout

B60, PCIE, SHARED = record_named("b60"), LINKS["pcie5x8"], NETWORKS["ib400-shared"]
SHAPE = BlockShape(512, 256, 32, 4)
times = st.floats(1e-6, 1.0)


def rows_of(tokens):
    return routed_rows(Model("any", 512, 256, 32, 4), tokens, torch.Generator().manual_seed(tokens))


def layer(tokens, ranks, chunks=1, link=PCIE, network=SHARED, row_bytes=(1056, 1024)):
    return predict_layer(SHAPE, tokens, ranks, rows_of, B60, link, network, row_bytes, chunks)


@pytest.mark.parametrize("experts, top_k, ranks", [(8, 2, 4), (9, 3, 4), (6, 6, 2), (5, 1, 5), (7, 2, 11)])
def test_the_share_of_tokens_is_that_of_all_their_choices(experts, top_k, ranks):
    local = -(-experts // ranks)
    choices = list(itertools.combinations(range(experts), top_k))
    expected = sum(any(expert < local for expert in choice) for choice in choices) / len(choices)
    assert share_of_tokens(BlockShape(64, 64, experts, top_k), ranks) == pytest.approx(expected)


def test_bytes_are_those_of_a_routing_that_is_counted():
    tokens, ranks = 6000, 4
    picked = torch.rand(tokens, 32).topk(4, dim=1).indices // 8
    remote = sum(len(set(ids) - {0}) for ids in picked.tolist())
    found = layer(tokens, ranks)
    assert found.sent_bytes == pytest.approx(remote * (1056 + 1024), rel=0.03)
    assert found.pair_bytes == tokens * 3 * 2 * 512 * 2 > found.sent_bytes


@given(times, times, times, st.integers(1, 9))
def test_chunks_take_at_least_the_longer_and_at_most_the_sum(dispatch, compute, combine, chunks):
    seconds = pipelined(dispatch, compute, combine, chunks)
    sending, computing = chunks * (dispatch + combine), chunks * compute
    assert max(sending, computing + dispatch + combine) <= seconds * (1 + 1e-9) and seconds <= (sending + computing) * (1 + 1e-9)
    if chunks == 1:
        assert seconds == pytest.approx(sending + computing)
    if compute >= max(chunks * dispatch, combine):      # the device never waits, nor does the link
        assert seconds == pytest.approx(dispatch + computing + combine)


def test_one_rank_has_the_block_alone():
    found, block = layer(500, 1, chunks=4), predict_block(SHAPE, 500, rows_of(500), B60)
    assert (found.seconds, found.compute) == (block.seconds, block.seconds)
    assert found.communication == found.sent_bytes == found.share == found.hidden == 0


def test_a_layer_of_several():
    one, two = (layer(16384, 4, chunks) for chunks in (1, 2))
    assert one.seconds == pytest.approx(one.compute + one.communication)
    assert two.compute == one.compute and two.sent_bytes == one.sent_bytes and two.communication > one.communication
    assert two.seconds < one.seconds and two.share < one.share and one.hidden == 0
    assert two.seconds == pytest.approx(two.compute + (1 - two.hidden) * two.communication)
    assert layer(16384, 4, row_bytes=(560, 1024)).communication < one.communication
    assert layer(16384, 16).communication > 3 * layer(16384, 8).communication     # of a second host
    assert layer(16384, 4, link=LINKS["pcie4x8"]).communication > 1.5 * one.communication


def test_the_rank_with_the_most_rows_counts():
    even, skewed = [100] * 32, [100] * 24 + [500] + [0] * 3 + [100] * 4
    order = random.sample(range(4), 4)
    moved = [rows for block in order for rows in skewed[8 * block:8 * block + 8]]
    assert chunk_seconds(SHAPE, 800, 4, [100] * 24 + [300] * 8, B60) > chunk_seconds(SHAPE, 800, 4, even, B60)
    assert chunk_seconds(SHAPE, 800, 4, moved, B60) == chunk_seconds(SHAPE, 800, 4, skewed, B60)


def test_an_exchange():
    link, network = replace(PCIE, bandwidth=20.0, latency=1e-6, ranks=4), replace(SHARED, bandwidth=5.0, latency=7e-6)
    assert exchange_seconds(1e6, 1, link, network) == 0
    assert exchange_seconds(1e6, 3, link, network) == pytest.approx(2 * (1e-6 + 1e6 / 20e9))
    assert exchange_seconds(1e6, 10, link, network) == pytest.approx(3e-6 + 6 * (7e-6 + 1e6 / 5e9))
    assert exchange_seconds(1e6, 10, link, replace(network, bandwidth=500.0)) == pytest.approx(3e-6 + 6 * 7e-6 + 9e6 / 20e9)
    assert exchange_seconds(1e6, 3, replace(link, peer_bandwidth=2.0), network) == pytest.approx(2e-6 + 1e6 / 2e9)


def test_links():
    assert PCIE.bandwidth == 28.4       # what is said of Arc Pro B60
    assert LINKS["pcie5x16"].bandwidth == pytest.approx(4 * LINKS["pcie4x8"].bandwidth, rel=0.01)
    assert all(link.source and link.bandwidth > 0 and link.latency > 0 for link in (*LINKS.values(), *NETWORKS.values()))
    assert {record.link for record in RECORDS} <= {"", *LINKS} and B60.link == "pcie5x8"


@pytest.mark.full
@pytest.mark.parametrize("name, ranks", [("qwen3-30b-a3b", 8), ("mixtral-8x7b", 4), ("deepseek-v3", 2), ("deepseek-v3", 8)])
def test_chunks_by_default_are_nearly_the_best(name, ranks):
    layers = Layers(MODELS[name], B60, Dtype.bf16, WeightLayout.enk, quantization=None, int8_rows=False, link=PCIE, network=SHARED)
    for tokens in (64, 1024, 4096, 16384):
        best = min(layers.predict(ranks, tokens, chunks).seconds for chunks in (1, 2, 4, 8))
        assert layers.predict(ranks, tokens).seconds <= 1.2 * best
