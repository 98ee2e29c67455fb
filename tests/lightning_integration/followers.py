"""Pipelines with targets that follow what is trained, as people write them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from tests.networks import mlp

BATCHES, RATE = 6, 0.1
Make = Callable[[Any], Optimizer]


def frozen(module: nn.Module) -> Any:
    """A copy that is not trained."""
    return copy.deepcopy(module).requires_grad_(False)


def batches() -> DataLoader[Any]:
    return DataLoader(range(BATCHES), batch_size=None)


class Pipeline(LightningModule):
    """What all have in common.

    Attributes:
        losses: of all steps.
        functions: after each batch, the outputs of each follower.
    """

    def __init__(self, make: Make) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.x = torch.randn(16, 6, dtype=torch.double)
        self.make = make
        self.losses: list[float] = []
        self.functions: list[list[Tensor]] = []
        self.build()
        self.double()

    def build(self) -> None:
        """Make what is trained."""
        self.net = mlp(6, 8, 7, 3)

    def copy(self) -> None:
        """Make the followers, when what is trained has its weights."""

    def loss(self, batch: int) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def update(self) -> None:
        """Let the followers follow."""

    def followers(self) -> list[Tensor]:
        """What the followers compute."""
        raise NotImplementedError

    def trained(self) -> list[nn.Parameter]:
        return list(self.net.parameters())

    def inputs(self, batch: int) -> Tensor:
        return self.x * (1 + 0.1 * batch) + 0.1 * batch

    def training_step(self, batch: int, batch_idx: int) -> Tensor | None:
        loss = self.loss(batch_idx)
        self.losses.append(float(loss))
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.update()
        with torch.no_grad():
            self.functions.append([output.clone() for output in self.followers()])

    def configure_optimizers(self) -> Any:
        return self.make(self.trained())


class Byol(Pipeline):
    """Bootstrap: the target has no predictor."""

    def build(self) -> None:
        self.encoder, self.projector, self.predictor = mlp(6, 8, 7), mlp(7, 8, 5), mlp(5, 8, 5)

    def copy(self) -> None:
        self.target_encoder, self.target_projector = frozen(self.encoder), frozen(self.projector)

    def loss(self, batch: int) -> Tensor:
        online = self.predictor(self.projector(self.encoder(self.inputs(batch))))
        with torch.no_grad():
            target = self.target_projector(self.target_encoder(self.x))
        return -F.cosine_similarity(online, target).mean()

    @torch.no_grad()
    def update(self) -> None:
        for leader, follower in (
            (self.encoder, self.target_encoder),
            (self.projector, self.target_projector),
        ):
            for p, t in zip(leader.parameters(), follower.parameters(), strict=True):
                t.lerp_(p, RATE)

    def followers(self) -> list[Tensor]:
        return [self.target_projector(self.target_encoder(self.x))]

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters() if p.requires_grad]


class Moco(Pipeline):
    """A momentum encoder, which is moved at the start of the step, and a queue of its keys."""

    def build(self) -> None:
        self.encoder_q = mlp(6, 8, 7, 5)
        self.register_buffer("queue", F.normalize(torch.randn(5, 32), dim=0))

    def copy(self) -> None:
        self.encoder_k = mlp(6, 8, 7, 5).double()
        for q, k in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
            k.data.copy_(q.data)
            k.requires_grad = False

    def loss(self, batch: int) -> Tensor:
        q = F.normalize(self.encoder_q(self.inputs(batch)), dim=1)
        with torch.no_grad():
            for p, t in zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True):
                t.data = t.data * (1 - RATE) + p.data * RATE
            k = F.normalize(self.encoder_k(self.x), dim=1)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.clone()], 1)
        self.queue[:, 16 * (batch % 2) : 16 * (batch % 2) + 16] = k.T
        return F.cross_entropy(logits / 0.5, torch.zeros(16, dtype=torch.long))

    def followers(self) -> list[Tensor]:
        return [self.encoder_k(self.x)]

    def trained(self) -> list[nn.Parameter]:
        return list(self.parameters())


class DinoHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp(7, 8, 5)
        self.last_layer = nn.utils.parametrizations.weight_norm(nn.Linear(5, 9, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Dino(Pipeline):
    """A teacher with a centre, and a head whose last layer is weight-normed."""

    def build(self) -> None:
        self.student = nn.Sequential(mlp(6, 8, 7), nn.ReLU(), DinoHead())
        self.register_buffer("center", torch.zeros(1, 9))

    def copy(self) -> None:
        self.teacher = nn.Sequential(mlp(6, 8, 7), nn.ReLU(), DinoHead()).double()
        self.teacher.load_state_dict(self.student.state_dict())
        for p in self.teacher.parameters():
            p.requires_grad = False

    def loss(self, batch: int) -> Tensor:
        student, teacher = self.student(self.inputs(batch)) / 0.5, self.teacher(self.x)
        loss = -(F.softmax((teacher - self.center) / 0.2, -1).detach() * F.log_softmax(student, -1)).sum(-1).mean()
        self.center = self.center * 0.9 + teacher.mean(0, keepdim=True).detach() * 0.1
        return loss

    @torch.no_grad()
    def update(self) -> None:
        for p, t in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            t.data.mul_(1 - RATE).add_(p.detach().data, alpha=RATE)

    def followers(self) -> list[Tensor]:
        return [self.teacher(self.x)]

    def trained(self) -> list[nn.Parameter]:
        return list(self.student.parameters())


class MeanTeacher(Pipeline):
    """A teacher with batch norm, whose statistics are averaged, too; it is moved in the step, in memory of its own."""

    def build(self) -> None:
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)
        )

    def copy(self) -> None:
        self.teacher = frozen(self.net)

    def loss(self, batch: int) -> Tensor:
        outputs = self.net(self.inputs(batch))
        for p, t in zip(self.net.state_dict().values(), self.teacher.state_dict().values(), strict=True):
            if t.is_floating_point():
                t -= RATE * (t - p.detach())
        with torch.no_grad():
            target = self.teacher(self.x).softmax(-1)
        return F.mse_loss(outputs.softmax(-1), target) + F.cross_entropy(outputs, torch.arange(16) % 3)

    def followers(self) -> list[Tensor]:
        return [copy.deepcopy(self.teacher).train()(self.x)]  # by statistics of the batch, as those kept may move


class Foreach(Pipeline):
    """A plain list of tensors, moved all at once in the step."""

    def copy(self) -> None:
        self.shadow = [p.detach().clone() for p in self.net.parameters()]

    def target(self) -> Tensor:
        names = [name for name, _ in self.net.named_parameters()]
        return torch.func.functional_call(self.net, dict(zip(names, self.shadow, strict=True)), (self.x,))

    def loss(self, batch: int) -> Tensor:
        with torch.no_grad():
            torch._foreach_lerp_(self.shadow, list(self.net.parameters()), RATE)
            target = self.target()
        return F.mse_loss(self.net(self.inputs(batch)), target + 1)

    def followers(self) -> list[Tensor]:
        return [self.target()]


class Dictionary(Foreach):
    """A dictionary of tensors by name, kept by an object of the user's, moved by two operations for all of them."""

    class Shadow:
        def __init__(self, net: nn.Module) -> None:
            self.values = {name: p.detach().clone() for name, p in net.named_parameters()}

    def copy(self) -> None:
        self.average = self.Shadow(self.net)

    def target(self) -> Tensor:
        return torch.func.functional_call(self.net, self.average.values, (self.x,))

    def loss(self, batch: int) -> Tensor:
        with torch.no_grad():
            torch._foreach_mul_(list(self.average.values.values()), 1 - RATE)
            torch._foreach_add_(list(self.average.values.values()), list(self.net.parameters()), alpha=RATE)
            target = self.target()
        return F.mse_loss(self.net(self.inputs(batch)), target + 1)


class Averaged(Pipeline):
    """torch's own average, of weights alone or of buffers, too; the loss does not look at it."""

    use_buffers = False

    def build(self) -> None:
        self.net = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)
        )

    def copy(self) -> None:
        self.average = AveragedModel(
            self.net, multi_avg_fn=get_ema_multi_avg_fn(1 - RATE), use_buffers=self.use_buffers
        )

    def loss(self, batch: int) -> Tensor:
        return F.cross_entropy(self.net(self.inputs(batch)), torch.arange(16) % 3)

    @torch.no_grad()
    def update(self) -> None:
        self.average.update_parameters(self.net)

    def followers(self) -> list[Tensor]:
        return [copy.deepcopy(self.average).train()(self.x)]


class AveragedBuffers(Averaged):
    use_buffers = True


class Dqn(Pipeline):
    """Manual optimization; the target follows softly in the step."""

    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def copy(self) -> None:
        self.q_target = copy.deepcopy(self.net)

    def loss(self, batch: int) -> Tensor:
        with torch.no_grad():
            target = 0.5 * batch + 0.9 * self.q_target(self.x).amax(1)
        return F.mse_loss(self.net(self.inputs(batch))[:, 0], target)

    def warmed(self) -> Any:
        """The optimizers; the very first step is at rest, as it may be the base's own."""
        found: Any = self.optimizers()
        for optimizer in found if isinstance(found, list) else [found]:
            for group in optimizer.param_groups:
                rate = group.setdefault("rate", group["lr"])
                group["lr"] = rate if self.functions or self.global_step else 0.0
        return found

    def training_step(self, batch: int, batch_idx: int) -> None:
        optimizer = self.warmed()
        loss = self.loss(batch_idx)
        self.losses.append(float(loss))
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.follow(batch_idx)

    def follow(self, batch: int) -> None:
        for p, t in zip(self.net.parameters(), self.q_target.parameters(), strict=True):
            t.data.copy_(RATE * p.data + (1 - RATE) * t.data)

    def followers(self) -> list[Tensor]:
        return [self.q_target(self.x)]


class HardDqn(Dqn):
    """The target is replaced every third step."""

    def follow(self, batch: int) -> None:
        if batch % 3 == 2:
            self.q_target.load_state_dict(self.net.state_dict())


class Sac(Dqn):
    """An actor and two critics, each of which has a target, and two optimizers."""

    def build(self) -> None:
        self.actor, self.critic_1, self.critic_2 = mlp(6, 8, 2), mlp(8, 9, 1), mlp(8, 9, 1)

    def copy(self) -> None:
        self.target_1, self.target_2 = copy.deepcopy(self.critic_1), copy.deepcopy(self.critic_2)

    def trained(self) -> list[nn.Parameter]:
        return [*self.actor.parameters(), *self.critic_1.parameters(), *self.critic_2.parameters()]

    def configure_optimizers(self) -> Any:
        critics = [*self.critic_1.parameters(), *self.critic_2.parameters()]
        return [self.make(self.actor.parameters()), self.make(critics)]

    def training_step(self, batch: int, batch_idx: int) -> None:
        actor, critics = self.warmed()
        x = self.inputs(batch_idx)
        action = self.actor(x).tanh()
        with torch.no_grad():
            both = torch.cat([self.x, action], 1)
            target = 1 + 0.9 * torch.minimum(self.target_1(both), self.target_2(both))
        both = torch.cat([x, action.detach()], 1)
        loss = F.mse_loss(self.critic_1(both), target) + F.mse_loss(self.critic_2(both), target)
        critics.zero_grad()
        self.manual_backward(loss)
        critics.step()
        both = torch.cat([x, self.actor(x).tanh()], 1)
        actor_loss = -torch.minimum(self.critic_1(both), self.critic_2(both)).mean()
        actor.zero_grad()
        self.manual_backward(actor_loss)
        actor.step()
        self.losses += [float(loss), float(actor_loss)]
        with torch.no_grad():
            for leader, follower in ((self.critic_1, self.target_1), (self.critic_2, self.target_2)):
                for p, t in zip(leader.parameters(), follower.parameters(), strict=True):
                    t.mul_(1 - RATE).add_(p, alpha=RATE)

    def followers(self) -> list[Tensor]:
        both = torch.cat([self.x, self.x[:, :2]], 1)
        return [self.target_1(both), self.target_2(both)]


PIPELINES = [Byol, Moco, Dino, MeanTeacher, Foreach, Dictionary, Averaged, AveragedBuffers, Dqn, HardDqn, Sac]
