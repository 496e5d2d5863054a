"""`python -m tests.benchmarks.patterns`: finding all attentions of a graph, against the number of its nodes."""

from __future__ import annotations

import operator
import time

import torch
from torch import fx

from surgery import ANY, Structure, as_digraph, one_of
from surgery.results import table


def attention_graph(blocks: int) -> fx.Graph:
    """A decoder's operations, 25 nodes a block, as one graph."""
    graph = fx.Graph()
    x, mask = graph.placeholder("x"), graph.placeholder("mask")
    for _ in range(blocks):
        normed = graph.call_function(torch.nn.functional.layer_norm, (x, (64,)))
        parts = []
        for name in "qkv":
            weight = graph.create_node("get_attr", name, name=name)
            projection = graph.call_function(torch.nn.functional.linear, (normed, weight))
            parts.append(graph.call_method("transpose", (graph.call_method("view", (projection, 2, 8, 4, 16)), 1, 2)))
        q, k, v = parts
        scores = graph.call_function(torch.matmul, (q, graph.call_method("transpose", (k, -2, -1))))
        scores = graph.call_function(operator.add, (graph.call_function(operator.mul, (scores, 0.25)), mask))
        weights = graph.call_function(torch.softmax, (scores, -1))
        mixed = graph.call_function(torch.matmul, (graph.call_method("to", (weights, torch.float32)), v))
        mixed = graph.call_method("reshape", (graph.call_method("transpose", (mixed, 1, 2)), 2, 8, 64))
        x = graph.call_function(operator.add, (x, mixed))
        x = graph.call_function(operator.add, (x, graph.call_function(torch.nn.functional.gelu, (x,))))
    graph.output(x)
    return graph


def pattern() -> Structure:
    def attention(q, k, v, mask):
        scores = one_of(q @ k.mT * ANY, q @ k.mT / ANY, q @ k.mT)
        return torch.softmax(one_of(scores + mask, scores), -1) @ v

    return Structure(attention)


def rows(sizes: tuple[int, ...] = (100, 1_000, 10_000, 100_000)) -> list[list[str]]:
    """Nodes, attentions found, milliseconds to convert and to find, microseconds a node."""
    table = []
    for size in sizes:
        graph = attention_graph(max(1, size // 25))
        spent = []
        matches: list = []
        for _ in range(3):
            start = time.process_time()
            digraph = as_digraph(graph)
            middle = time.process_time()
            matches = pattern().find(digraph)
            spent.append((middle - start, time.process_time() - middle))
        convert, find = (min(times) for times in zip(*spent, strict=True))
        nodes = len(digraph)
        each = f"{(convert + find) / nodes * 1e6:.1f}"
        table.append([f"{nodes:,}", f"{len(matches):,}", f"{convert * 1e3:.1f}", f"{find * 1e3:.1f}", each])
    return table


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(["nodes", "attentions", "as_digraph, ms", "find, ms", "µs a node"], rows()))
