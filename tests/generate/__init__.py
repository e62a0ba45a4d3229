"""Who answers: every number comes from outside the code."""
