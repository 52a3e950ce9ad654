"""From a plan to parameters on devices."""
