"""From folders of source code to snippets of code lines, in shards that can be read from any position."""
