"""The middle layers are run twice, with the same weights.

Whence: Universal Transformer (Dehghani 2018, 1807.03819), here of the middle alone, as slowrun's leaders do.
Expected: better by the token, as if it were deeper; worse by the clock, which pays for every pass.
"""
import model

loop_layers: int = 2        # 1..: how many layers, those in the middle, at most n_layer
loop_times: int = 2         # 1..: how often they are run


class GPT(model.GPT):

    def build(self, config):
        super().build(config)
        if config.loop_layers > config.n_layer:
            raise ValueError(f'loop_layers is {config.loop_layers}, n_layer only {config.n_layer}')
        self.first = (config.n_layer - config.loop_layers) // 2

    def layers(self, x, context):
        x0, end, times = x, self.first + self.config.loop_layers, self.config.loop_times
        for n in range(times):                     # the first pass begins at the bottom, the last goes on to the top
            own = context._replace(cache=self.cache_of(n, context.cache))
            for block in self.blocks[self.first if n else 0:end if n < times - 1 else None]:
                x = block(x, x0, own)
        return x

    def cache_of(self, n, cache):
        """A layer makes other keys in every pass: passes after the first have caches of their own beside `cache`."""
        if cache is None or n == 0:
            return cache
        if n not in (caches := vars(cache).setdefault('passes', {})):
            caches[n] = model.KVCache(self, len(cache.doc_start))
        caches[n].length, caches[n].follows = cache.length, cache.follows
        return caches[n]

    def matrices(self):
        looped = self.blocks[self.first:self.first + self.config.loop_layers].modules()
        again = [m.weight for m in looped if isinstance(m, model.Linear)]
        return again * (self.config.loop_times - 1) + super().matrices()

    def flops_per_token(self, attended=None):
        c, weights = self.config, 6 * sum(p.numel() for p in self.matrices())
        passes = 1 + c.loop_layers * (c.loop_times - 1) / c.n_layer
        return weights + passes * (super().flops_per_token(attended) - weights)
