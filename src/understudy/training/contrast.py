"""The options of a contrast of rationales."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ContrastOptions(BaseModel):
    """What a method takes whose loss is `understudy.losses.rationales.many_to_one` beside the answer alone (paper 21)."""

    beta: float = Field(0.2, ge=0, description="β, weight of negatives; 0 asks the student for none.")
    delta: float = Field(3.0, description="δ, nats a token: a negative less likely than this is let be.")
    reduce: Literal["max", "min"] = Field(
        "max", description="The negative that counts: of most or least cross-entropy."
    )
    quality: bool = Field(True, description="Weigh rationales by the discriminator; off, all alike.")
    alpha_label: float = Field(0.5, ge=0, description="α₁, weight of the answer alone.")
    alpha_rationale: float = Field(0.5, ge=0, description="α₂, weight of the contrast of rationales.")
