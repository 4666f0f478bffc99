"""``jaxdraft plan``: what a recipe takes, before anything is rented; with a topology, from its compiled programs."""
