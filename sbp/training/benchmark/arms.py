"""The arms of the benchmark: ways to train one network."""

from dataclasses import dataclass
from typing import Any

EXACT, DROPPING, SBP, RELEASE = "exact gradient", "token dropping", "SBP", "SBP, authors' release"
KINDS = (EXACT, DROPPING, SBP, RELEASE)


@dataclass(frozen=True)
class Arm:
    """One way to train the network.

    kind: one of KINDS. sbp: arguments of `sbp.apply` besides those in the config; None for timm's model as it is.
    compile: what torch.compile is given, the "model" or its "blocks"; None for eager mode. budget: its
    activation_memory_budget, the share of the activations that it would save by itself.
    graph: forward and backward pass are captured as a CUDA graph, and replayed. cast_together: the weights are cast to
    autocast's precision in one call a step.
    """

    label: str
    kind: str = EXACT
    sbp: dict[str, Any] | None = None
    compile: str | None = None
    budget: float = 1.0
    graph: bool = False
    cast_together: bool = False
    checkpointing: bool = False
    patch_drop: float = 0.0
    vit_only: bool = False
    release: bool = False


CHEAP, QUERY, QUARTER = {"recompute": "cheap"}, {"mhsa_drop": "query"}, {"keep_ratio": 0.25}

ARMS = {  # "plain" is timm's model as anybody trains it; compiled code casts weights as it sees fit
    "plain": Arm("plain"),
    "casts": Arm("casts together", cast_together=True),
    "graph": Arm("graph", graph=True, cast_together=True),
    "checkpoint": Arm("checkpointing", checkpointing=True),
    "cheap": Arm("cheap recompute", sbp={"keep_ratio": 1.0} | CHEAP),
    "cheap_graph": Arm("cheap recompute + graph", sbp={"keep_ratio": 1.0} | CHEAP, graph=True, cast_together=True),
    "compile": Arm("compile", compile="model"),
    "compile_0.9": Arm("compile, budget 0.9", compile="model", budget=0.9),
    "compile_0.5": Arm("compile, budget 0.5", compile="model", budget=0.5),
    "compile_0.25": Arm("compile, budget 0.25", compile="model", budget=0.25),
    "compile_graph": Arm("compile + graph", compile="model", graph=True),
    "blocks": Arm("compiled blocks", compile="blocks"),
    "blocks_graph": Arm("compiled blocks + graph", compile="blocks", graph=True),
    "patch_dropout": Arm("PatchDropout 0.5", DROPPING, patch_drop=0.5, vit_only=True),
    "sbp": Arm("SBP", SBP, sbp={}),
    "sbp_casts": Arm("SBP, casts together", SBP, sbp={}, cast_together=True),
    "sbp_graph": Arm("SBP + graph", SBP, sbp={}, graph=True, cast_together=True),
    "sbp_cheap": Arm("SBP, cheap recompute", SBP, sbp=CHEAP),
    "sbp_cheap_graph": Arm("SBP, cheap recompute + graph", SBP, sbp=CHEAP, graph=True, cast_together=True),
    "sbp_25_cheap": Arm("SBP 0.25, cheap recompute", SBP, sbp=QUARTER | CHEAP),
    "sbp_block": Arm("SBP, block recompute", SBP, sbp={"recompute": "block"}),
    "sbp_query": Arm("SBP, query", SBP, sbp=QUERY, vit_only=True),
    "sbp_query_graph": Arm("SBP, query + graph", SBP, sbp=QUERY, vit_only=True, graph=True, cast_together=True),
    "query_cheap": Arm("SBP, query, cheap recompute", SBP, sbp=QUERY | CHEAP, vit_only=True),
    "query_25": Arm("SBP 0.25, query", SBP, sbp=QUERY | QUARTER, vit_only=True),
    "query_25_cheap": Arm("SBP 0.25, query, cheap recompute", SBP, sbp=QUERY | QUARTER | CHEAP, vit_only=True),
    "sbp_head": Arm("SBP, head", SBP, sbp={"mhsa_drop": "head"}, vit_only=True),
    "sbp_qkv_exact": Arm("SBP, qkv_exact", SBP, sbp={"mhsa_drop": "qkv_exact"}, vit_only=True),
    "sbp_compile": Arm("SBP + compile", SBP, sbp={}, compile="model"),
    "sbp_compile_0.5": Arm("SBP + compile, budget 0.5", SBP, sbp={}, compile="model", budget=0.5),
    "sbp_compile_graph": Arm("SBP + compile + graph", SBP, sbp={}, compile="model", graph=True),
    "sbp_blocks": Arm("SBP + compiled blocks", SBP, sbp={}, compile="blocks"),
    "sbp_blocks_graph": Arm("SBP + compiled blocks + graph", SBP, sbp={}, compile="blocks", graph=True),
    "release": Arm("authors' release", RELEASE, sbp={}, release=True),
}
