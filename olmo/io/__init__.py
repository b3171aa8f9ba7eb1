"""Files that come and go: written whole, downloaded, in buckets, gz, named by patterns."""
