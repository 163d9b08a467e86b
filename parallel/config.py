"""Options of how a model is spread over ranks."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

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
    overlap_degree: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="fssdp: most experts per layer that get copies; auto measures how many hide under attention, and"
        " how many more are so loaded that copies pay even if they do not",
    )
    max_copies: int | None = Field(None, ge=1, description="fssdp: copies that one rank may hold per layer; null: all")
    predictor: Literal["mean", "ema", "last"] = Field("mean", description="what the next loads are predicted from")
    window: int = Field(5, ge=1, description="steps that the predictor looks back")
    reshard_interval: int = Field(0, ge=0, description="ep, fssdp: steps between moves of owners; 0: stay")
    link_mbit: float | None = Field(
        None, gt=0, description="rate of each rank's link, each way; null measures it at the start"
    )
    node_link_mbit: float | None = Field(
        None, gt=0, description="with link_mbit: rate of the link that the ranks of a node share; null: no such limit"
    )
    split: SplitRule = Field("even", description="how rows are split over the holders of an expert")
    algorithm: Literal[Algorithm, "auto"] = Field("auto", description="way of the copies; auto takes the fastest")
    bucket_mib: float = Field(
        4.0, gt=0, description="ddp: gradient bucket size; a full bucket is reduced during backward"
    )
    # gloo counts milliseconds in 31 bits.
    timeout_s: float = Field(600.0, gt=0, le=2e6, description="how long a collective may wait for a late rank")

    @field_validator("max_copies", mode="before")
    @classmethod
    def _room_for_one(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and value < 1:
            raise ValueError(
                "is memory for less than one expert; 1 is the least, null sets no bound,"
                " and parallel.mode=ep makes no copies"
            )
        return value

    def check(self) -> list[str]:
        """Combinations that ask for what would not happen, as ``"option: message"``; empty when all is well.

        A bound that holds anyway is harmless (``max_copies`` where nothing is copied), as is how to do what is not
        done (``algorithm``, ``predictor``); work that was asked for and a bound that would be broken are not.
        """
        problems = []
        if self.mode in ("local", "ep", "fsdp") and self.planner != "predict":
            why = "makes no copies" if self.mode == "ep" else "has every expert on every rank"
            problems.append(
                f"planner: {self.planner} decides which experts are copied, but parallel.mode={self.mode} {why};"
                " it goes with fssdp-keep and fssdp-rm"
            )
        if self.mode == "fsdp":
            bounds = {"max_copies": self.max_copies, "overlap_degree": self.overlap_degree}
            problems += [
                f"{option}: {value} is a bound on copies that parallel.mode=fsdp does not keep, since it copies every"
                " expert to every rank; it goes with fssdp-keep and fssdp-rm"
                for option, value in bounds.items()
                if value not in (None, "auto")
            ]
        if self.mode in ("local", "fsdp") and self.reshard_interval:
            problems.append(
                f"reshard_interval: moving owners levels nothing with parallel.mode={self.mode}, which has every expert"
                " on every rank; it goes with ep, fssdp-keep and fssdp-rm"
            )
        if self.mode == "ep" and self.reshard_interval and self.overlap_degree not in (0, "auto"):
            problems.append(
                f"overlap_degree: with {self.overlap_degree}, parallel.reshard_interval={self.reshard_interval} would"
                " leave the most loaded experts to copies, but parallel.mode=ep makes none; leave it auto"
            )
        if self.node_link_mbit is not None and self.link_mbit is None:
            problems.append("node_link_mbit: goes with parallel.link_mbit; without it links are measured")
        return problems
