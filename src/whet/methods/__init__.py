"""An algorithm is a value: a frozen record of named parts."""

from whet.methods.online import Algorithm, Penalty, clip_bounds, credited, diagnostics
from whet.methods.part import Part, Term, part

__all__ = ["Algorithm", "Part", "Penalty", "Term", "clip_bounds", "credited", "diagnostics", "part"]
