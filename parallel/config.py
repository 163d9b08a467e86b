"""Options of how a model is spread over ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from parallel.exchange import Algorithm
from parallel.row_split import SplitRule

ExpertMode = Literal["local", "ep", "fsdp", "fssdp-keep", "fssdp-rm"]


class ParallelConfig(BaseModel):
    """Where experts and the other parameters live, and what moves between ranks."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mode: ExpertMode = Field(
        "local",
        description="experts: local copies on every rank; ep: each on its owner; fsdp: all gathered for each layer;"
        " fssdp-keep: some gathered, kept until backward; fssdp-rm: gathered again for backward",
    )
    dense: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="non-expert parameters: ddp: whole on every rank; fsdp: a slice on each, gathered for each block",
    )
    planner: Literal["predict", "calibrate", "spill"] = Field(
        "predict",
        description="fssdp: copies by predicted loads (predict); then more by true loads after the gate where they pay"
        " (calibrate), or as few as level the ranks exactly (spill)",
    )
    overlap_degree: int | Literal["auto"] = Field(
        "auto",
        description="fssdp: most experts per layer that get copies; auto measures how many hide under attention, and"
        " how many more are so loaded that copies pay even if they do not",
    )
    max_copies: int | None = Field(None, ge=1, description="fssdp: copies that one rank may hold per layer; null: all")
    predictor: Literal["mean", "ema", "last"] = Field("mean", description="what the next loads are predicted from")
    window: int = Field(5, ge=1, description="steps that the predictor looks back")
    reshard_interval: int = Field(0, ge=0, description="fssdp: steps between moves of owners; 0: owners stay")
    link_mbit: float | None = Field(
        None, gt=0, description="rate of each rank's link, each way; null measures it at the start"
    )
    node_link_mbit: float | None = Field(
        None, gt=0, description="with link_mbit: rate of the link that the ranks of a node share; null: no such limit"
    )
    split: SplitRule = Field("even", description="how rows are split over the holders of an expert")
    algorithm: Algorithm | Literal["auto"] = Field("auto", description="way of the copies; auto takes the fastest")
    bucket_mib: float = Field(
        4.0, gt=0, description="ddp: gradient bucket size; a full bucket is reduced during backward"
    )
    # gloo counts milliseconds in 31 bits.
    timeout_s: float = Field(600.0, gt=0, le=2e6, description="how long a collective may wait for a late rank")
