"""A training step of walkers on a graph: products of whole maps in log L rounds beside a loop over the tokens.

The limits in `layers/scan.py` follow from this table: multiplications per token, B M K^3, at which the loop wins.

B batch  L length  R edge sets  M walkers  K nodes
"""

from __future__ import annotations

from itertools import product

import torch
from timing import Contestant, Row, Settings, argument_parser, measure, report

from research_eval.layers.scan import WalkerGraph

EDGE_SETS = 8
SIZES = ((1, 4, 16), (4, 4, 16), (8, 4, 8), (8, 4, 16), (32, 4, 16))  # B, M, K; more samples only lose more
LENGTHS = (64, 512)


def step(graph: WalkerGraph, picks: torch.Tensor, every_position: bool, composed: bool) -> Contestant:
    hops = graph._composed if composed else graph._mix if picks.is_floating_point() else graph._grouped

    def forward_and_backward() -> None:
        hops(picks, every_position).square().sum().backward()

    return forward_and_backward


def rows(settings: Settings) -> list[Row]:
    cases = list(product(SIZES[:1] if settings.tiny else SIZES, LENGTHS[:1] if settings.tiny else LENGTHS))
    device, found = torch.device(settings.device), list[Row]()
    for number, ((batch, walkers, nodes), length) in enumerate(cases):
        graph = WalkerGraph(EDGE_SETS, walkers, nodes).to(device).train()
        numbers_BL = torch.randint(0, EDGE_SETS + 1, (batch, length), device=device)
        weights_BLS = torch.rand(batch, length, EDGE_SETS + 1, device=device).softmax(-1)
        row: Row = {"B": batch, "L": length, "M": walkers, "K": nodes, "B M K^3": batch * walkers * nodes**3}
        share = settings.share(len(cases) - number) / 4
        for name, picks in (("numbers", numbers_BL), ("weights", weights_BLS)):
            for every_position, places in ((False, "last"), (True, "every place")):
                arms = {
                    "composed": step(graph, picks, every_position, composed=True),
                    "loop": step(graph, picks, every_position, composed=False),
                }
                row[f"{name}, {places}"] = measure(arms, share, settings).faster("composed", "loop")
        found.append(row)
    return found


def main() -> None:
    settings = Settings(**vars(argument_parser(__doc__).parse_args()))
    report("scan", settings, {"Products of maps, times as fast as a loop over the tokens": rows(settings)})


if __name__ == "__main__":
    main()
