"""Tokens a step grow by the clock (Smith 2017, 1711.00489).

Expected: more steps early.
"""
import train

batch_start: float = 0.25    # 0..1: share of tokens_per_step as training begins
batch_full: float = 0.5      # 0..1: progress at which a step has all of them

class Run(train.Run):
    def micro_steps(self):
        share = self.s.batch_start + (1 - self.s.batch_start) * min(1, self.progress / self.s.batch_full)
        return max(1, round(super().micro_steps() * share))
