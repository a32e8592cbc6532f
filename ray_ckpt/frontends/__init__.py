"""What users of other checkpoint interfaces change an import for; a framework is only imported when it is used."""
