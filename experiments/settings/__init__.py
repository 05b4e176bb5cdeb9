"""What a run is told: recipes, options, changes to them, and their ranges."""
