package bulk

import (
	"math/rand/v2"
	"strings"
	"testing"
)

// Text that YAML could take for something else comes back as it was.
func TestTextSurvives(t *testing.T) {
	texts := []string{"null", "~", "true", "no", "0x10", "010", "1e3", "1_000", ".nan", "2001-01-01", "12:30", "- x", "a: b", "a #b", "#", "'", `"`, `\`,
		" x", "x ", "  ", "*a", "&a", "!a", "|", ">", "%", "@", "`", "{a}", "[a", "a,b", "ä", "🐟", "?", "? x", ":", "<<", "=", "---", "...",
		"a\nb", "a\n", "\ta", "a\rb", "\x01", "\x7f", "\u0085", "\u2028"}
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	const letters = " -:#'\"\\*&!|>%@`{}[],?<=~.0a1x_/ätruenl"
	for range 2000 {
		runes := []rune(letters)
		s := make([]rune, 1+random.IntN(8))
		for i := range s {
			s[i] = runes[random.IntN(len(runes))]
		}
		texts = append(texts, string(s))
	}
	for _, s := range texts {
		f, err := Parse("f.yaml", []byte(head+tail))
		if err != nil {
			t.Fatal(err)
		}
		f.Groups[0].Select = []Selector{{User: s, Label: "k=" + s}}
		text, err := f.Text()
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse("f.yaml", text)
		if err != nil {
			t.Errorf("seed %d: %q: %v\n%s", seed, s, err, text[strings.Index(string(text), "select"):])
			continue
		}
		if got := again.Groups[0].Select[0]; got != f.Groups[0].Select[0] {
			t.Errorf("seed %d: %q comes back as %+v", seed, s, got)
		}
	}
}
