"""Static-SAE: the same latents for every prompt, chosen once by the column sums of the map."""

from dspa.maps.cdmap import ConditionalDifferenceMap


def static_map(cdmap: ConditionalDifferenceMap) -> ConditionalDifferenceMap:
    """Return a map whose every row holds the column sums of `A`, so that the prompt does not matter.

    Steer with it at `k_prompt=1`. `k_diff`, `alpha` and `mode` mean what they mean for DSPA.
    """
    sums = cdmap.values.double().sum(dim=0).float()
    return cdmap.replaced(values=sums.expand_as(cdmap.values).contiguous())
