"""The training and evaluation loop of every model, on FuxiCTR's BaseModel."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model_zoo.batch import AnyBatch, Batch
from model_zoo.collapse import evaluation_figures
from model_zoo.compat import BaseModel, FeatureMap, get_loss, get_optimizer
from model_zoo.errors import ConfigError
from model_zoo.guards import StepStart, check_step, shield
from model_zoo.interrupts import Stopped, held
from model_zoo.pipeline.metrics import evaluate_metrics
from model_zoo.regularization import Term, add_gradient, penalty, terms
from model_zoo.resume import StateSaver, restore
from model_zoo.sparse_optimizer import RowAdam, clip_gradients, one_batch_gradients, use_sparse_tables

logger = logging.getLogger("model_zoo")


class TrainingLoop(BaseModel):
    """FuxiCTR's fit with a record of every evaluation, exact metrics and no state carried between epochs.

    Args:
        feature_map: FuxiCTR's.
        learning_rate: of the optimizer.
        accumulation_steps: batches per optimizer step; an epoch's last incomplete group is stepped at its end.
        longctr_compat: LongCTR's loop: the incomplete group is carried into the next epoch.
        sparse_embedding_updates: a step moves only the table rows that its batches touch, see `RowAdam`.
        params: FuxiCTR's own keys.
    """

    def __init__(
        self,
        feature_map: FeatureMap,
        *,
        learning_rate: float,
        accumulation_steps: int,
        longctr_compat: bool,
        sparse_embedding_updates: bool = False,
        embedding_regularizer: float | str | None = None,
        net_regularizer: float | str | None = None,
        **params: Any,
    ) -> None:
        super().__init__(
            feature_map,
            embedding_regularizer=embedding_regularizer or None,
            net_regularizer=net_regularizer or None,
            **{"verbose": 0, "model_root": "./checkpoints/", "metrics": ["AUC", "logloss"], **params},
        )
        self.accumulation_steps = accumulation_steps
        self.longctr_compat = longctr_compat
        self.sparse_embedding_updates = sparse_embedding_updates
        self.learning_rate = learning_rate
        self._configured_eval_steps: int | None = params.get("eval_steps")
        self.history: list[dict[str, Any]] = []
        self.seed: int | None = params.get("seed")
        self._gradient_norm = 0.0
        self._norm_sum, self._norm_max, self._norm_count = 0.0, 0.0, 0
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self.phase_name = "train"
        self.epochs_trained = 0
        self.saver: StateSaver | None = None
        self.resume_from: dict[str, Any] | None = None

    # ---- labels, groups ----------------------------------------------------------------------------------------------

    def get_labels(self, inputs: AnyBatch) -> Tensor:
        """Labels ``[B, 1]`` float on the model's device."""
        label = inputs.label if isinstance(inputs, Batch) else inputs[0][self.feature_map.labels[0]]
        return label.to(self.device).float().view(-1, 1)

    def get_group_id(self, inputs: AnyBatch) -> Tensor:
        """Groups of the grouped metrics, ``[B]``."""
        if isinstance(inputs, Batch):
            assert inputs.group is not None
            return inputs.group
        return inputs[0][self.feature_map.group_id]

    # ---- loss --------------------------------------------------------------------------------------------------------

    def compute_loss(self, return_dict: dict[str, Any], y_true: Tensor) -> Tensor:
        """Task loss, the block's auxiliary terms and the regulariser, all differentiable.

        `train_step` comes to the same gradients without the regulariser's part of the graph: it calls `data_loss`, so to
        train on another loss override that one, or FuxiCTR's ``add_loss``.
        """
        return self.data_loss(return_dict, y_true) + self.regularization_loss()

    def data_loss(self, return_dict: dict[str, Any], y_true: Tensor) -> Tensor:
        """Task loss and auxiliary terms: what depends on the batch."""
        loss = self.add_loss(return_dict, y_true)
        for term in return_dict["losses"]:
            loss = loss + (term(y_true) if callable(term) else term)
        return loss

    def regularization_loss(self) -> Tensor | float:
        """FuxiCTR's regulariser over trainable parameters: ``(lambda / p) |w|_p^p``, see `regularization.terms`."""
        return penalty(self._regularizer_terms())

    def _regularizer_terms(self) -> Iterator[Term]:
        return terms(self, self._embedding_regularizer, self._net_regularizer, self.longctr_compat)

    def compile(self, optimizer: str, loss: str, lr: float) -> None:
        """FuxiCTR's hook: choose optimizer and loss.

        Raises:
            NotImplementedError: torch has no such optimizer or loss.
            ValueError: ``sparse_embedding_updates`` with another optimizer than adam.
        """
        if self.sparse_embedding_updates:
            if optimizer.lower() != "adam":
                raise ValueError(f"sparse_embedding_updates needs optimizer adam, not {optimizer}")
            use_sparse_tables(self)
        self._optimizer_name = optimizer
        self.loss_fn = get_loss(loss)
        self.use_optimizer(lr)

    def use_optimizer(self, learning_rate: float) -> None:
        """A new optimizer over the parameters that train now, and no gradients left over."""
        self.zero_grad(set_to_none=True)
        trainable = [p for p in self.parameters() if p.requires_grad]
        if self._optimizer_name.lower() == "adam":
            adam = RowAdam if self.sparse_embedding_updates else partial(torch.optim.Adam, fused=True)
            self.optimizer = adam(trainable, lr=learning_rate)
        else:
            self.optimizer = get_optimizer(self._optimizer_name, trainable, learning_rate)

    def fit(
        self,
        data_generator: Any,
        epochs: int = 1,
        validation_data: Any = None,
        max_gradient_norm: float = 10.0,
        **kwargs: Any,
    ) -> None:
        """FuxiCTR's training, on a fresh evaluation schedule; the best checkpoint is loaded at the end.

        If ``resume_from`` holds the state of such a training (`resume.capture`), it goes on from there, and ends with
        the weights and metrics that it would have come to without the stop.

        Raises:
            ConfigError: ``eval_steps`` is longer than the whole training, or ``resume_from`` is another model's.
        """
        steps = len(data_generator) * epochs
        if self._configured_eval_steps is not None and self._configured_eval_steps > steps:
            raise ConfigError(
                f"eval_steps ({self._configured_eval_steps}) is longer than {self.phase_name}'s {steps} steps; lower it"
            )
        os.makedirs(os.path.dirname(self.checkpoint), exist_ok=True)
        self.valid_gen = validation_data
        self._max_gradient_norm = max_gradient_norm
        self._eval_steps = self._configured_eval_steps or len(data_generator)
        self._best_metric = np.inf if self._monitor_mode == "min" else -np.inf
        self._stopping_steps, self._stop_training = 0, False
        self._epoch_index, self._batch_index, self._batches_done, self._total_steps = 0, 0, 0, 0
        self._loss_sum, self._loss_count, self._rows_trained, self._evaluation_due = 0.0, 0, 0, False
        self._norm_sum, self._norm_max, self._norm_count, self._gradient_norm = 0.0, 0.0, 0, 0.0
        self._epoch_start = time.perf_counter()
        state, self.resume_from = self.resume_from, None
        if state is not None:
            restore(self, state)
            if state["stage"] == "done":
                return
        while self._epoch_index < epochs and not self._stop_training:
            self.train_epoch(data_generator)
        self.load_weights(self.checkpoint)

    def train_step(self, batch_data: AnyBatch) -> Tensor:
        """Forward and backward of one batch; an optimizer step every ``accumulation_steps`` batches.

        Returns:
            The batch's whole loss (a scalar on the CPU, not divided), under ``sparse_embedding_updates`` with the
            regulariser of the table rows that the batch touches.

        Raises:
            NotFiniteError: a prediction, the loss or a gradient is NaN or infinite; nothing was changed then.
        """
        start = StepStart.of(self)
        return_dict = self.forward(batch_data)
        predicted = shield(return_dict)
        loss = self.data_loss(return_dict, self.get_labels(batch_data))
        with one_batch_gradients(self.parameters()):
            if loss.requires_grad:  # not so if what trains has no part in this batch, as experts in one without histories
                (loss / self.accumulation_steps).backward()
            regularizer = add_gradient(self._regularizer_terms(), 1 / self.accumulation_steps)
        total, self._gradient_norm = check_step(self, batch_data, start, predicted, loss.detach() + regularizer)
        if (self._batch_index + 1) % self.accumulation_steps == 0:
            self._optimizer_step()
        return total

    def _optimizer_step(self) -> None:
        if self._gradient_norm + 1e-6 > 0.999 * self._max_gradient_norm:  # else clipping would multiply by 1
            clip_gradients([p for p in self.parameters() if p.requires_grad], self._max_gradient_norm)
        self._norm_sum += self._gradient_norm
        self._norm_max = max(self._norm_max, self._gradient_norm)
        self._norm_count += 1
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradient_norms(self) -> dict[str, float]:
        """``mean`` and ``max`` of the gradients' norm, before clipping, over the steps since the last evaluation."""
        return {"mean": self._norm_sum / self._norm_count, "max": self._norm_max} if self._norm_count else {}

    def train_epoch(self, data_generator: Any) -> None:
        """One pass over the training data with evaluations every ``eval_steps`` batches (default: at its end).

        What a step or an evaluation changes, it changes in a section that a signal cannot interrupt, so that the state
        that is written after a signal is one between two steps.
        """
        if hasattr(data_generator, "set_epoch"):
            data_generator.set_epoch(self.epochs_trained)
        self.train()
        total = len(data_generator)
        progress = tqdm(
            total=total,
            initial=self._batches_done,
            desc=f"{self.phase_name} epoch {self._epoch_index + 1}",
            unit="batch",
            disable=not (self._verbose and sys.stderr.isatty()),
            leave=False,
        )
        try:
            if self._evaluation_due:
                self.eval_step()
            with closing(progress):
                for batch in batches_from(data_generator, self._batches_done) if not self._stop_training else ():
                    with held():
                        self._train_on(batch, last=self._batches_done + 1 == total)
                        if self.saver is not None:
                            self.saver.after_step(self)
                    progress.update()
                    progress.set_postfix(loss=f"{self._loss_sum / self._loss_count:.4f}", refresh=False)
                    if self._evaluation_due:
                        self.eval_step()
                    if self._stop_training:
                        break
            with held():
                self.epochs_trained += 1
                self._epoch_index += 1
                self._batches_done = 0
                self._loss_sum, self._loss_count, self._rows_trained = 0.0, 0, 0
                self._epoch_start = time.perf_counter()
        except Stopped:
            if self.saver is not None:
                self.saver.write(self)
            raise

    def _train_on(self, batch: AnyBatch, last: bool) -> None:
        """One batch's step, and how far that brings the training."""
        self._batch_index = self._batches_done
        self._loss_sum += float(self.train_step(batch))
        self._loss_count += 1
        self._rows_trained += len(self.get_labels(batch))
        if last and not self.longctr_compat:
            self._flush_accumulation()
        self._batches_done += 1
        self._total_steps += 1
        self._evaluation_due = self._total_steps % self._eval_steps == 0

    def _flush_accumulation(self) -> None:
        """Step with the epoch's last, incomplete accumulation group, its gradient scaled to that group's mean."""
        left = (self._batch_index + 1) % self.accumulation_steps
        if left:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.accumulation_steps / left)
            self._gradient_norm *= self.accumulation_steps / left
            self._optimizer_step()

    def eval_step(self) -> None:
        """Validate, record the epoch, keep the best checkpoint, decide on early stopping."""
        seconds = time.perf_counter() - self._epoch_start
        scores = self.evaluate(self.valid_gen)
        figures = evaluation_figures(self, self.valid_gen)
        record = {
            "phase": self.phase_name,
            "epoch": self._epoch_index + 1,
            "step": self._total_steps,
            "seconds": seconds,
            "eval_seconds": time.perf_counter() - self._epoch_start - seconds,
            "train_loss": self._loss_sum / max(self._loss_count, 1),
            "rows_per_second": self._rows_trained / max(seconds, 1e-9),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "valid": scores,
            **figures,
        }
        with held():
            self.history.append(record)
            self.checkpoint_and_earlystop(scores)
            record["best"] = self._stopping_steps == 0
            self._loss_sum, self._loss_count, self._rows_trained, self._evaluation_due = 0.0, 0, 0, False
            self._norm_sum, self._norm_max, self._norm_count = 0.0, 0.0, 0
            self._epoch_start = time.perf_counter()
        shown = " ".join(f"{name} {value:.6f}" for name, value in scores.items())
        verdict = "best so far" if record["best"] else f"no gain ({self._stopping_steps} of {self._early_stop_patience})"
        logger.info(
            "%s epoch %d: loss %.6f, valid %s, %s, %.1f s + %.1f s evaluation",
            self.phase_name, record["epoch"], record["train_loss"], shown, verdict, seconds, record["eval_seconds"],
        )  # fmt: skip
        for listener in self.listeners:
            listener(record)
        self.train()

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, data_generator: Any, metrics: list[str] | None = None) -> dict[str, float]:
        """All metrics of a split in one pass.

        Args:
            data_generator: yields batches.
            metrics: default: the configured ones and those that the monitor needs.
        """
        names = metrics or list(dict.fromkeys([*self.validation_metrics, *self._monitor.get_metrics()]))
        prediction, label, group = self.predict_split(data_generator)
        return self.evaluate_metrics(label, prediction, names, group)

    def predict_split(self, data_generator: Iterable[AnyBatch]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Predictions float32 ``[N]``, labels ``[N]`` and groups ``[N]`` (or None) of a split, in its order."""
        self.eval()
        predictions, labels, groups = [], [], []
        with torch.no_grad():
            for batch in data_generator:
                predictions.append(self.forward(batch)["y_pred"].float().view(-1).cpu())
                labels.append(self.get_labels(batch).view(-1).cpu())
                if self.feature_map.group_id is not None:
                    groups.append(self.get_group_id(batch))
        group = torch.cat(groups).numpy() if groups else None
        return torch.cat(predictions).numpy(), torch.cat(labels).numpy(), group

    def predict(self, data_generator: Iterable[AnyBatch]) -> np.ndarray:
        """Click probabilities float32 ``[N]`` of a split, in its order."""
        return self.predict_split(data_generator)[0]

    def evaluate_metrics(
        self, y_true: np.ndarray, y_pred: np.ndarray, metrics: list[str], group_id: np.ndarray | None = None
    ) -> dict[str, float]:
        """Our exact metrics in place of FuxiCTR's; ``longctr_compat`` clips logloss at 1e-7 as FuxiCTR 2.3.2 does."""
        return evaluate_metrics(y_true, y_pred, metrics, group_id, 1e-7 if self.longctr_compat else None)


def batches_from(data_generator: Any, number: int) -> Iterator[AnyBatch]:
    """An epoch's batches from the given one on; a loader of ours does not make those before."""
    if number and hasattr(data_generator, "iterate_from"):
        return iter(data_generator.iterate_from(number))
    return islice(iter(data_generator), number, None)
