"""The page that shows runs while they train, and what the experts do (`goe dashboard`, `goe atlas`)."""
