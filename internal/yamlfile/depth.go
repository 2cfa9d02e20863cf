package yamlfile

import (
	"bytes"

	"github.com/goccy/go-yaml/token"
)

// The parser takes time that grows with the square of the depth: minutes for
// 100 KB of brackets.
const maxDepth = 64

// tooDeep returns where more than maxDepth levels may begin on one line, or nil.
// It counts characters that open a level, also those in quotes: no honest line
// has so many. Levels by indentation are bounded by the size of the file, as
// each costs a longer line.
func tooDeep(data []byte) *token.Token {
	depth, line := 0, 0
	for text := range bytes.Lines(data) {
		line++
		for i, b := range text {
			switch b {
			case '[', '{':
				depth++
			case ']', '}':
				depth = max(0, depth-1)
			}
			if depth > maxDepth {
				return &token.Token{Position: &token.Position{Line: line, Column: i + 1}}
			}
		}
		if i := manyDashes(text); i > 0 {
			return &token.Token{Position: &token.Position{Line: line, Column: i}}
		}
	}
	return nil
}

// manyDashes returns the column at which a line that opens a level by each of its
// first words, or marks what follows by them, has done so too often; or 0.
func manyDashes(text []byte) int {
	n := 0
	for i := 0; i < len(text); i++ {
		switch b := text[i]; {
		case b == ' ':
			continue
		case (b == '-' || b == '?' || b == ':') && i+1 < len(text) && text[i+1] == ' ':
		case b == '&' || b == '!':
			for i+1 < len(text) && text[i+1] != ' ' {
				i++
			}
		default:
			return 0
		}
		if n++; n > maxDepth {
			return i + 1
		}
	}
	return 0
}
