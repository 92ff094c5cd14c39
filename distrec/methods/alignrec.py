"""AlignRec, stage 2 (Liu et al., CIKM 2024). Section numbers in brackets refer to docs/methods/alignrec.md.

Content never enters the score as a vector of its own: it gates the item's ID vector (3.4) and determines the item graph
(3.2). X is the concatenation of the chosen feature sets, each with rows of unit length. The published program's unused
layers (3.6) and unused options (4) are left out.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch.nn import functional

from distrec.config.bounds import MOST_LAYERS, MOST_NEIGHBOURS, MOST_WIDTH
from distrec.data.dataset import Dataset
from distrec.data.histories import Histories
from distrec.graph.polynomial import mean_of_powers
from distrec.methods.base import Graph, Method, MethodConfig, Representations, require_features
from distrec.methods.batch import TripleBatch
from distrec.methods.losses import bpr
from distrec.methods.workspace import Workspace
from distrec.tables.features import Fill, unit_rows
from distrec.tables.spec import Table


class Gate(torch.nn.Module):
    """G = sigmoid((X W_m^T + b_m) W_g^T + b_g), the content's gate on item ID vectors (3.4)."""

    def __init__(self, width: int, dim: int, layer_norm: bool):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width) if layer_norm else torch.nn.Identity()
        self.mm_trs = torch.nn.Linear(width, dim)
        self.gate_v = torch.nn.Linear(dim, dim)

    def forward(self, content: torch.Tensor) -> torch.Tensor:
        """`[items, width]` to `[items, dim]`."""
        return torch.sigmoid(self.gate_v(self.mm_trs(self.norm(content))))


class AlignRec(Method):
    """Scores are inner products of rows of H = H_id + H_mm (3.5)."""

    class Config(MethodConfig):
        features: list[str] = Field(
            ["text", "image"],
            description="feature sets that are concatenated in this order to make X, the content of the items (3)",
        )
        fill: Fill = Field(
            "mean",
            description="vector of an item without a feature row: mean of the present rows, or zeros, before "
            "normalisation",
        )
        dim: int = Field(64, ge=1, le=MOST_WIDTH, description="d, width of the vectors of both views (3)")
        user_item_layers: int = Field(
            2, ge=0, le=MOST_LAYERS, description="n_ui_layers, number of hops on the user-item graph (3.3)"
        )
        item_layers: int = Field(
            1, ge=0, le=MOST_LAYERS, description="n_layers, number of hops on the item graph S (3.4)"
        )
        knn_k: int = Field(
            10,
            ge=1,
            le=MOST_NEIGHBOURS,
            description="number of neighbours of an item in the item graph S, itself included (3.2)",
        )
        reg_weight: float = Field(1e-4, ge=0, description="weight of the L2 term on the batch's final vectors (4.2)")
        uia_weight: float = Field(
            0.1, ge=0, description="ui_cosine_loss_weight, weight of user-item alignment; 0 leaves it out (4.3)"
        )
        cl_loss: float = Field(
            0.01, ge=0, description="weight of the two terms of content-category alignment; 0 leaves them out (4.4)"
        )
        cca_temperature: float = Field(
            0.2,
            ge=0.03,
            description="tau, temperature of content-category alignment; a constant in the published program (4.4)",
        )
        sim_weight: float = Field(0.1, ge=0, description="weight of the similarity regulariser; 0 leaves it out (4.5)")
        side_emb_div: float = Field(
            0.0, description="divisor of the content view H_mm before it is added to the ID view; 0: no division (3.5)"
        )
        layer_norm: bool = Field(False, description="use_ln, apply LayerNorm to X before the gate (3.4)")
        moving_target: bool = Field(
            True,
            description="keep the target of the similarity regulariser equal to X as it trains, as published; false: "
            "to the initial X (3.6)",
        )

    config: AlignRec.Config
    changeable = ("reg_weight", "uia_weight", "cl_loss", "cca_temperature", "sim_weight")

    def __init__(self, config: AlignRec.Config, data: Dataset):
        super().__init__(config, data)
        require_features(data, config.features, "alignrec")
        self.width = sum(data.feature(name).width for name in config.features)

    def features(self) -> list[str]:
        return self.config.features

    def build(self, space: Workspace) -> None:
        super().build(space)
        config = self.config
        sets = [space.features(name, config.fill) for name in config.features]
        self.initial_content = torch.cat([unit_rows(rows) for rows in sets], 1)
        self.user_item = space.user_item()
        made_of = {
            "features": config.features,
            "fill": config.fill,
            "rows": "unit rows side by side, unit rows of these",
        }
        lists = space.neighbours(unit_rows(self.initial_content), config.knn_k, made_of)
        self.item_item = space.item_graph([lists], "cosine")
        self.layer_weights = mean_of_powers(config.user_item_layers)

    def tables(self) -> list[Table]:
        dim = self.config.dim
        return [
            Table("user", "user", dim),
            Table("item", "item", dim),
            Table("content", "item", self.width, start=lambda: self.initial_content),
        ]

    def dense(self) -> torch.nn.Module:
        return Gate(self.width, self.config.dim, self.config.layer_norm)

    def graphs(self) -> dict[str, Graph]:
        return {"user_item": self.user_item, "item_item": self.item_item}

    def views(self) -> tuple[Representations, Representations]:
        """My rows of the ID view H_id (3.3) and of the content view H_mm (3.4)."""
        users, items = self.user_item.propagate(self.block("user"), self.block("item"), self.layer_weights)
        content = self.block("item") * self.dense_module(self.block("content"))
        for _ in range(self.config.item_layers):
            content = self.item_item.times(content)
        if self.config.side_emb_div:
            content = content / self.config.side_emb_div
        return Representations(users, items), Representations(self.user_item.to_users(content), content)

    def representations(self, histories: Histories) -> Representations:
        ids, content = self.views()
        return Representations(ids.users + content.users, ids.items + content.items)

    def loss(self, batch: TripleBatch) -> dict[str, torch.Tensor]:
        config = self.config
        ids, content = self.views()
        # Contrastive and similarity terms compare rows of the whole batch, so every worker gets its distinct rows.
        user_id, user_content = batch.users.distinct(ids.users, content.users)
        item_id, item_content = batch.positives.distinct(ids.items, content.items)
        users = (user_id + user_content)[batch.users.place]
        positives = (item_id + item_content)[batch.positives.place]
        (negatives,) = batch.negatives.rows(ids.items + content.items)
        squares = users.square().sum() + positives.square().sum() + negatives.square().sum()
        terms = {
            "bpr": batch.mean(bpr(users, positives, negatives)),
            "reg": config.reg_weight * squares / 2 / batch.full_size,
        }
        if config.uia_weight:
            terms["uia"] = config.uia_weight * batch.mean(1 - functional.cosine_similarity(users, positives, dim=1))
        if config.cl_loss:
            # Content rows are the anchors, ID rows the candidates (4.4).
            tau = config.cca_temperature
            items = batch.positives.contrast(item_content, item_id, tau)
            users = batch.users.contrast(user_content, user_id, tau)
            terms["cca_item"] = config.cl_loss * (items / batch.size)
            terms["cca_user"] = config.cl_loss * (users / batch.size)
        if config.sim_weight:
            terms["sim"] = config.sim_weight * self._similarity(item_content, batch)
        return terms

    def _similarity(self, item_content: torch.Tensor, batch: TripleBatch) -> torch.Tensor:
        """My share of || Z_p Z_p^T - cos(X_p, X_p) ||_F / B over the batch's positives (4.5).

        An item that occurs c times has c rows and c columns in these matrices; scaling its row by sqrt(c) has the same
        effect.
        """
        content = self.block("content").detach() if self.config.moving_target else self.initial_content
        (target,) = batch.positives.distinct(content)
        scale = batch.positives.counts.sqrt().unsqueeze(1)
        squares = self.space.gram_distance(item_content * scale, unit_rows(target) * scale)
        # Without any content both matrices are zero, where a square root has no derivative: the clamp makes it zero.
        norm = self.space.total(squares).clamp(min=1e-30).sqrt()
        return self.space.share(norm / batch.size)
