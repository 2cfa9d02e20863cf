package wire

// Type is the kind of a frame.
type Type uint8

const (
	TypeMessage Type = 1 // control lane: a CBOR message of the handover in Meta
	TypeBlob    Type = 2 // control lane: a piece of a large message in Payload
	TypeWant    Type = 3 // destination asks for page ranges: Meta is Want
	TypePages   Type = 4 // source answers: Meta is Pages, Payload their content
	TypeRefuse  Type = 5 // source cannot give the pages asked for: Meta is Refuse
	TypePing    Type = 6 // keep-alive; Meta is echoed in TypePong
	TypePong    Type = 7
)
