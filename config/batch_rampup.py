"""A step has few tokens at first and more by and by, up to tokens_per_step: more steps of the same text.

Whence: Smith 2017 (1711.00489); GPT-3 (Brown 2020, 2005.14165). Learning rates stay what they are.
Expected: a little better where steps are few, nothing where gradients of a whole step are noisy still. Did:
2.4570 val_bpb in 109 steps, seed 1, beside 2.4754 and 2.4713 (seeds 1, 2) in 74 (150,000 tokens,
2026-11-25, commit 1116f3a; RESULTS.md, "Three new ideas"). Neutral: 0.7 % ahead, one seed, no control of
small steps throughout; by the clock, 90 s, one seed: 1.6 % ahead.
"""
import train

ramp_start: float = 0.25    # 0..1: share of tokens_per_step that the first steps have
ramp_end: float = 0.5       # 0..1: progress from which on they have all


class Run(train.Run):

    def rows_limit(self):
        """A step is one micro-batch at least, so the first step's rows are the most that one can have."""
        rows = self.s.tokens_per_step // (self.s.block_size * self.world)
        return max(1, min(super().rows_limit(), round(self.s.ramp_start * rows)))

    def micro_steps(self, progress):
        rise = min(1.0, progress / self.s.ramp_end) if self.s.ramp_end else 1.0
        share = self.s.ramp_start + (1 - self.s.ramp_start) * rise
        return max(1, round(share * super().micro_steps(progress)))

    def build(self):
        train.refuse(self.s.max_tokens and self.s.max_steps, 'batch_rampup.py counts steps or tokens: give max_steps or max_tokens')
        super().build()
        s, self.in_all = self.s, 0                         # tokens, where steps are counted
        a_part = self.micro * s.block_size * self.world
        if s.max_tokens:                                   # the clock takes all steps to be alike
            steps = 0
            while self.in_all < s.max_tokens:
                self.in_all += self.micro_steps(self.in_all / s.max_tokens) * a_part
                steps += 1
            self.clock.max_steps = steps
        elif n := self.clock.max_steps:
            self.in_all = sum(self.micro_steps(step / n) for step in range(n)) * a_part

    def expected_tokens(self):
        told = super().expected_tokens()
        return self.in_all or told

    def count(self, *account):
        super().count(*account)
        if self.s.max_tokens:                              # progress by tokens, as a clock would have it
            self.clock.progress = min(1.0, self.tokens / self.s.max_tokens)
