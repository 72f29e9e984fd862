"""Study files: schema, loader, validation."""
