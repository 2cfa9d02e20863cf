// Package schema makes the JSON Schemas (draft 2020-12) of the configuration
// files, daemon.json and bulk.json beside it, for editors and for whoever checks
// files before they reach a host.
//
// They come from the Go types by reflection: keys, types and permitted words from
// the tags that the loader checks as well (internal/yamlfile), descriptions from
// the comments at the fields. Our own reflection, because what there is in
// libraries for it knows neither these tags nor units in text, brings five modules
// along, and would not be shorter with all that turned into its terms.
//
// A schema accepts what the loader accepts, save that numbers where text is meant
// want quotes, and that a section or a text must not be empty. It does not know what hangs together: which hosts are named, groups
// that wait for each other, units that are too small.
package schema

//go:generate go run ./renew
