"""How large a model should be, and how much text it should see: the results of Chinchilla, and a later correction.

Hoffmann et al., "Training Compute-Optimal Large Language Models" (arXiv 2203.15556), took three approaches. N is the
number of parameters, D the number of tokens, and training takes 6 N D FLOPs.
"""

import math
from dataclasses import dataclass

# Approach 2 (table A3): (N, D) of models that are the best for their FLOPs
TABLE_A3 = (
    (400e6, 7.7e9),
    (1e9, 20.0e9),
    (10e9, 219.5e9),
    (67e9, 1.7e12),
    (175e9, 4.3e12),
    (280e9, 7.1e12),
    (520e9, 13.4e12),
    (1e12, 26.5e12),
    (10e12, 292.0e12),
)


@dataclass(frozen=True)
class LossFit:
    """Approach 3: the loss (nats a token) is irreducible + a / N ** alpha + b / D ** beta."""

    irreducible: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        return self.irreducible + self.a / parameters**self.alpha + self.b / tokens**self.beta

    @property
    def _balance(self) -> float:
        """G of the paper's equation 4: the best N for C FLOPs is G * (C / 6) ** (beta / (alpha + beta))."""
        return (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))

    def best_size(self, flops: float) -> tuple[float, float]:
        """The parameters and the tokens with the lowest loss for this number of training FLOPs."""
        parameters = self._balance * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return parameters, flops / 6 / parameters

    def best_tokens(self, parameters: float) -> float:
        """The number of tokens with which a model of this size is the best for its FLOPs."""
        flops = 6 * (parameters / self._balance) ** ((self.alpha + self.beta) / self.beta)
        return flops / 6 / parameters


PUBLISHED = LossFit(irreducible=1.69, a=406.4, b=410.7, alpha=0.34, beta=0.28)
# The same data, fitted again: Besiroglu et al., "Chinchilla Scaling: A replication attempt" (arXiv 2404.10102). The
# published fit contradicts the paper's other two approaches, and this fit agrees with them.
CORRECTED = LossFit(irreducible=1.8172, a=482.01, b=2085.43, alpha=0.3478, beta=0.3658)


def tokens_by_table(parameters: float) -> float:
    """The best number of tokens for a size by approach 2: the line of least squares through the logarithms."""
    points = [(math.log(size), math.log(tokens)) for size, tokens in TABLE_A3]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return math.exp(mean_y + slope * (math.log(parameters) - mean_x))
