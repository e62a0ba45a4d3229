"""Learners, generators and rewards as Ray actors: placement, restarts, isolation of attempts."""

from whet.cluster.placement import Wanted
from whet.cluster.ray import connected
from whet.cluster.survive import survive
from whet.cluster.world import Attempt

__all__ = ["Attempt", "Wanted", "connected", "survive"]
