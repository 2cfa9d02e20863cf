// Package yamlfile reads configuration files strictly: a key that is not known,
// given twice or without a value, and a value of another type, are errors that
// begin with file:line:column and say what was meant.
//
// What a file holds is a struct whose fields carry their keys in yaml tags.
// Further tags say which values a field takes, and are checked by CheckTags and
// repeated in the JSON Schema of the file (configs/schema):
//
//	oneof:"a b c"   one of these words
//	min:"1"         for integers; 0 is unset and passes
//	max:"16"        likewise
//
// What tags cannot say is for the struct's own Validate, which names the place by
// a FieldError. Nothing here keeps state; everything may be called concurrently.
package yamlfile
