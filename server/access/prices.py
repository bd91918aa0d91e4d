"""What a request costs by the price table."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Prices:
    """US dollars per million tokens. The defaults are the hosted price of GLM-4.7."""

    input_price: float = field(default=0.43, metadata={"help": "USD per million prompt tokens"})
    output_price: float = field(default=1.75, metadata={"help": "USD per million answer tokens"})
    cached_price: float = field(
        default=0.08, metadata={"help": "USD per million prompt tokens found in the prefix cache"}
    )

    def cost(self, num_prompt: int, num_cached: int, num_completion: int) -> float:
        """US dollars for a request whose prompt includes `num_cached` cached tokens."""
        millionths = (
            (num_prompt - num_cached) * self.input_price
            + num_cached * self.cached_price
            + num_completion * self.output_price
        )
        # Cents of a millionth of a millionth are the noise of binary fractions.
        return round(millionths / 1e6, 12)
