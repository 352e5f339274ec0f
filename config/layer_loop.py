"""The middle layers are run twice, with the same weights.

Whence: Universal Transformer (Dehghani 2018, 1807.03819), here of the middle alone, as slowrun's leaders
do. Expected: better by the token, as if deeper; worse by the clock. Did: 2.4906 val_bpb, seed 1, beside
2.4754 and 2.4713 (seeds 1, 2), with 39 % more FLOPs (150,000 tokens, 2026-11-25, commit 1116f3a;
RESULTS.md, "Three new ideas"). By the clock, 90 s: +18.6 %. Lost: worse even by the token, that early. In a
doll of the half hour (RESULTS.md, "Dolls") all four layers twice, on 4/7 of the tokens: 2.2401 beside 2.2131,
+1.2 %. Slowrun's leaders switch loops on late: --loop_from=0.7.
"""
import model
import train
from config import refuse

loop_layers: int = 2        # 1..: how many layers, those in the middle, at most n_layer
loop_times: int = 2         # 1..: how often they are run
loop_from: float = 0.0      # 0..0.99: progress after which they are; before, each runs once


class GPT(model.GPT):
    grows_deeper = False    # other layers would be looped
    looping = True          # as it is sampled from; a checkpoint from before loop_from is not yet that model

    def build(self, config):
        super().build(config)
        if config.loop_layers > config.n_layer:
            raise ValueError(f'loop_layers is {config.loop_layers}, n_layer only {config.n_layer}')

    def layers(self, x, context):
        c, x0, first = self.config, x.view_as(x), (self.config.n_layer - self.config.loop_layers) // 2
        times = c.loop_times if self.looping else 1
        for n in range(times):                       # the first from the bottom, the last to the top
            end = first + c.loop_layers if n < times - 1 else c.n_layer
            mine = context._replace(cache=self.cache_of(n, context.cache))
            for block in self.blocks[first if n else 0:end]:
                x = block(x, x0, mine)
        return x

    def cache_of(self, n, cache):
        """In every pass a layer makes other keys: later passes have caches of their own beside `cache`."""
        if cache is not None and n > 0:
            cache, main = cache.part(('pass', n), self), cache
            cache.length, cache.follows = main.length, main.follows
        return cache

    def flops_per_token(self, attended=None):
        plain, c = super().flops_per_token(attended), self.config
        of_layers = {id(p) for p in self.blocks.parameters()}
        layers = plain - 6 * sum(p.numel() for p in self.matrices() if id(p) not in of_layers)
        return plain + self.looping * layers * c.loop_layers * (c.loop_times - 1) / c.n_layer


KEEPERS = {'snapshots', 'best_weights', 'cyclic_average'}      # of weights of several moments


class Run(train.Run):

    def __init__(self, s, ideas):
        super().__init__(s, ideas)
        kept = [name for kind in type(self).__mro__ if (name := kind.__module__.rpartition('.')[2]) in KEEPERS]
        refuse(s.loop_from and kept, f'loop_from is {s.loop_from:g}, and {"".join(kept[:1])}.py keeps weights from before it, which '
               f'would be measured with loops: say --loop_from=0, or leave one out')

    def take_model(self, model):
        super().take_model(model)
        self.loop()

    def loop(self):
        """Whether the model is at where its loops begin; True if that is new."""
        before = self.model.looping
        self.set_looping(self.progress >= self.s.loop_from)
        return self.model.looping != before

    def set_looping(self, looping):
        for net in self.model.modules():
            if hasattr(net, 'looping'):
                net.looping = looping

    def step(self):
        if self.loop():
            self.flops_per_token = self.arithmetic()
        super().step()

    def load(self, state):
        super().load(state)
        self.loop()                              # its progress is known now

    def closing_evaluation(self):
        self.set_looping(True)                   # as whoever loads it will ask it
        return super().closing_evaluation()

    def dearer(self):
        """The closing evaluation is of a model that loops."""
        looping, now = self.model.looping, self.model.flops_per_token()
        self.set_looping(True)
        then = self.model.flops_per_token()
        self.set_looping(looping)
        return super().dearer() * then / now
