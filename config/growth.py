"""Growth: a model gets wider or deeper while it trains, and begins by computing what it did before.

    torchrun train.py config/babylm.py config/growth.py --growth="[(0.3, dict(n_embd=640))]"
    python train.py config/babylm.py config/growth.py --init_from=out/small --n_embd=512      a finished run grows

Width by HyperCloning (Samragh 2024, 2409.12903), depth by layers that do nothing at first, or by a stack of
the old (Du 2024, 2405.15319): config/grown_weights.py says how. The optimizer's averages carry over, rates
follow n_embd, and the time that it takes is on the clock. In a stack the config that grows comes last: those
before it compute their sizes from the final ones. What it did stands in config/hypercloning.py and
config/raise.py, which set how it grows.

An idea that grows otherwise says so in Run.grown_config where a size says it (config/tokenformer_grow.py), in
Run.plan where none does, and its modules say how (`grow_from` in config/grown_weights.py). Run.change_model
goes on with a grown model and the mapping that says where its parameters came from.
"""
import dataclasses
import functools
import time

import model as models
import train
from config.grown_weights import carried, give_states, grow, grown_config
from prepare_data import UserError, refuse

growth: tuple = ()               # (progress, sizes from then on), ...: [(0.3, dict(n_embd=384)), ...]
growth_snr_db: float = 10.0      # the weights' power over that of the noise that tells copies apart
growth_depth: str = 'fresh'      # fresh|stack: new layers that do nothing at first, or a stack of the old
head_scale: float = 1.0          # 0.000001..: of the last hidden states; growth lowers a tied head's


class GPT(models.GPT):
    """A tied head's input is made smaller by growth, as its matrix cannot be: it is the token table."""
    page = '''
        Model.prototype.forward = (forward => function (ids) {
            forward.call(this, ids);
            for (let i = 0; i < this.x.length; i++) this.x[i] *= this.config.head_scale;
        })(Model.prototype.forward);'''

    def final(self, x):
        x = super().final(x)
        return x * self.config.head_scale if self.config.head_scale != 1 else x


class Run(train.Run):

    def __init__(self, s, ideas):
        super().__init__(s, ideas)
        self.times['growth'], self.n_grown = 0.0, 0

    def grown_config(self, config, changes):
        joined = [kind.__module__.rpartition('.')[2] for kind in config.GPT.__mro__ if not vars(kind).get('grows_deeper', True)]
        by = self.ideas.set_at.get('growth', '').rpartition('.py:')[0] or 'growth'
        refuse(joined and changes.get('n_layer', 0) > config.n_layer, f'{by}.py adds layers, and {"".join(joined[:1])}.py joins '
               f'them by their numbers: leave one out, or let widths grow alone')
        return grown_config(config, changes, self.s.growth_depth == 'stack')

    def grow(self, old, config, seed):
        """The model grown to a config, and where its parameters came from."""
        return grow(old, config, self.s.growth_snr_db, self.s.growth_depth == 'stack', seed)

    def plan(self, config):
        """[(progress, the config from then on)], from the config that the run begins with."""
        stages, last = [], 0.0
        for stage in self.s.growth:
            try:
                at, changes = stage
                if not last < at < 1:
                    raise ValueError(f'progress {at} does not lie between {last} and 1')
                config, last = self.grown_config(config, changes), at
            except (TypeError, ValueError, AttributeError) as e:
                raise UserError(f'growth has {stage!r} ({e}): write it like [(0.3, dict(n_embd=512))]') from e
            stages.append((at, config))
        return stages

    def find_checkpoint(self):
        checkpoint = super().find_checkpoint()
        self.n_grown = checkpoint['grown'] if checkpoint else 0
        return checkpoint

    @functools.cached_property
    def stages(self):
        """What is left of the plan."""
        return self.plan(self.config_of_settings() if self.resuming else self.config)[self.n_grown:]

    def largest(self):
        return self.stages[-1][1] if self.stages else self.config

    def shape_names(self):
        return [*super().shape_names(), 'head_scale']

    def shape_from(self, before):
        """Another run's shape, grown to what is given here."""
        theirs, ours, given = before.config, self.config, self.ideas.set_at
        shape = {k: getattr(theirs, k) for k in self.shape_names() if hasattr(theirs, k)}
        changes = {k: getattr(ours, k) for k in shape if k in given and getattr(ours, k) != shape[k]}
        try:
            config = self.grown_config(dataclasses.replace(ours, **shape), changes)
        except ValueError as e:
            raise UserError(f'{self.s.init_from} is of another model, and {e}: give its shape, or none') from e
        vars(self.s).update({k: getattr(config, k) for k in self.shape_names()})
        return config

    def start_from(self, before):
        theirs, ours = before.config, self.config
        if any(getattr(theirs, k, getattr(ours, k)) != getattr(ours, k) for k in self.shape_names()):
            before, _ = self.grow(before, ours, self.s.seed)
        super().start_from(before)

    def groups(self, model):
        groups = super().groups(model)      # a head that growth has scaled down answers that much less
        groups['heads']['base_lr'] /= model.config.head_scale
        return groups

    def dearer(self):
        return super().dearer() * models.blueprint(self.largest()).flops_per_token() / self.model.flops_per_token()

    def get_going(self):
        began = time.monotonic()
        super().get_going()
        self.warm_seconds = self.agreed(time.monotonic() - began)     # what a growth will take, more or less

    def time_left(self):
        while super().time_left():
            room = self.clock.max_steps or self.left > 2 * self.warm_seconds
            if not (self.stages and self.progress >= self.stages[0][0] and room):
                return True
            self.grow_now()                      # that took time: once more
        return False

    def grow_now(self):
        began, (_, config) = time.monotonic(), self.stages.pop(0)
        self.n_grown, self.clock.progress = self.n_grown + 1, self.progress
        self.energy.turn('idle')
        self.change_model(*self.grow(self.model, config, self.s.seed + self.n_grown))
        self.choose_kernels()
        self.get_going()
        self.say(f'         grown to {self.model.describe()}')
        self.warm_seconds = self.agreed(time.monotonic() - began)
        self.times['growth'] += self.warm_seconds
        self.clock.trained += self.warm_seconds
        self.energy.turn('train')

    def change_model(self, new, came_from):
        """Goes on with a grown model, and optimizers that know what the old ones knew. came_from: {parameter:
        (old parameter, copies that share its gradient, how it was spread)}."""
        state = carried(self.optimizers, came_from)
        self.take_model(new)
        for optimizer in self.optimizers:
            give_states(optimizer, state)

    def state(self):
        return super().state() | dict(grown=self.n_grown)

    def finish(self):
        if self.stages and not self.stopping:
            self.say(f'warning: no time was left for the growth at progress {self.stages[0][0]:g}')
        super().finish()
