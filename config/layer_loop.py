"""The middle layers run twice with the same weights (Universal Transformer, Dehghani 2018, 1807.03819).

Expected: worse by the clock, better by the token.
"""
import model

loop_times: int = 2       # 1..: times that the middle layers run
loop_from: int = 1        # 0..: first layer of the loop
loop_to: int = 3          # 1..: layer after the last of the loop

class GPT(model.GPT):
    def layers(self, x, context):
        x0 = x
        first, last = self.config.loop_from, self.config.loop_to
        for block in [*self.blocks[:first], *list(self.blocks[first:last]) * self.config.loop_times, *self.blocks[last:]]:
            x = block(x, x0, context)
        return x
