import Foundation

/// Sentencepiece tokens of the kind BPE between begin and end marks, padded to a fixed length, as
/// in `SentencePieceTokenizer` of mlx_snapgen/networks/text_encoders/sentencepiece.py.
///
/// Reads sentencepiece's `.model` file. Texts are arrays of scalars, because canonically equivalent
/// texts are equal as Swift `String`s, but not for sentencepiece.
public struct Tokenizer: Sendable {
    public let maxLength: Int
    private let pieces: [[Unicode.Scalar]: (id: Int32, score: Float)]
    private let unknown: Int32
    private let begin: Int32
    private let end: Int32
    private let pad: Int32

    private static let space: Unicode.Scalar = "\u{2581}"

    /// - Parameter maxLength: tokens per prompt, marks included.
    public init(contentsOf url: URL, maxLength: Int) throws {
        try self.init(model: Data(contentsOf: url), maxLength: maxLength)
    }

    public init(model: Data, maxLength: Int) throws {
        var pieces: [[Unicode.Scalar]: (id: Int32, score: Float)] = [:]
        var trainer: [Int: Int] = [:]
        var id: Int32 = 0
        for (number, value) in try protobufFields([UInt8](model)) {
            guard case .bytes(let bytes) = value else { continue }
            if number == 1 {
                let piece = try Tokenizer.piece(bytes)
                if piece.kind == 1 {
                    pieces[piece.text] = (id, piece.score)
                }
                id += 1
            } else if number == 2 {
                for (key, value) in try protobufFields(bytes) {
                    if case .number(let number) = value {
                        trainer[key] = Int(truncatingIfNeeded: number)
                    }
                }
            }
        }
        guard trainer[3] == 2, trainer[35, default: 0] == 0 else {
            throw SnapGenError("the tokenizer is not sentencepiece's BPE without byte fallback")
        }
        self.maxLength = maxLength
        self.pieces = pieces
        unknown = Int32(truncatingIfNeeded: trainer[40, default: 0])
        begin = Int32(truncatingIfNeeded: trainer[41, default: 1])
        end = Int32(truncatingIfNeeded: trainer[42, default: 2])
        pad = Int32(truncatingIfNeeded: trainer[43, default: -1])
    }

    /// One entry of the vocabulary; kind 1 is a token of text.
    private static func piece(_ bytes: [UInt8]) throws
        -> (text: [Unicode.Scalar], score: Float, kind: UInt64)
    {
        var text: [Unicode.Scalar] = []
        var score: Float = 0
        var kind: UInt64 = 1
        for (number, value) in try protobufFields(bytes) {
            switch (number, value) {
            case (1, .bytes(let raw)):
                text = Array(String(decoding: raw, as: UTF8.self).unicodeScalars)
            case (2, .bytes(let raw)):
                let bits = raw.reversed().reduce(UInt32(0)) { $0 << 8 | UInt32($1) }
                score = Float(bitPattern: bits)
            case (3, .number(let number)): kind = number
            default: break
            }
        }
        if text.dropFirst().contains(space) {
            throw SnapGenError("the tokenizer has tokens of several words, which are not supported")
        }
        return (text, score, kind)
    }

    /// Tokens and mask of `maxLength`; the mask is 1 where a token counts.
    public func callAsFunction(_ prompt: String) -> (tokens: [Int32], mask: [Int32]) {
        let row: [Int32] = [begin] + Array(encode(prompt).prefix(maxLength - 2)) + [end]
        let rest = maxLength - row.count
        return (
            row + [Int32](repeating: pad, count: rest),
            [Int32](repeating: 1, count: row.count) + [Int32](repeating: 0, count: rest)
        )
    }

    /// Token ids without begin mark, end mark, padding or truncation.
    public func encode(_ prompt: String) -> [Int32] {
        var ids: [Int32] = []
        for word in Tokenizer.words(prompt) {
            for symbol in merge([Tokenizer.space] + word) {
                let id = pieces[symbol]?.id ?? unknown
                // A run of unknown characters is one unknown token.
                if id != unknown || ids.last != unknown {
                    ids.append(id)
                }
            }
        }
        return ids
    }

    /// Byte-pair encoding: of all neighbors that make a token, merge those of the highest score,
    /// the leftmost first, until no neighbors make a token.
    private func merge(_ word: [Unicode.Scalar]) -> [[Unicode.Scalar]] {
        var symbols = word.map { [$0] }
        while true {
            var best: (score: Float, index: Int)?
            for index in symbols.indices.dropLast() {
                guard let piece = pieces[symbols[index] + symbols[index + 1]] else { continue }
                if best.map({ piece.score > $0.score }) ?? true {
                    best = (piece.score, index)
                }
            }
            guard let chosen = best else { return symbols }
            let right = symbols.remove(at: chosen.index + 1)
            symbols[chosen.index] += right
        }
    }

    /// Composed Unicode (NFKC) in lower case, cut at white space, without control characters.
    static func words(_ prompt: String) -> [[Unicode.Scalar]] {
        let text = prompt.precomposedStringWithCompatibilityMapping.lowercased()
        var words: [[Unicode.Scalar]] = [[]]
        for scalar in text.unicodeScalars {
            switch scalar.value {
            // Characters that are white space in Python but not in Unicode, and those that
            // sentencepiece's rules "nmt_nfkc" replace by spaces.
            case 0x1C...0x1F, 0x61C, 0x200B, 0x200C, 0x200E, 0x200F, 0xFEFF, 0xFFFD:
                words.append([])
            case 0x01...0x08, 0x0E...0x1B, 0x7F, 0x8F, 0x9F:
                continue
            default:
                if scalar.properties.isWhitespace || scalar == Tokenizer.space {
                    words.append([])
                } else {
                    words[words.count - 1].append(scalar)
                }
            }
        }
        return words.filter { !$0.isEmpty }
    }
}

enum ProtobufValue {
    case number(UInt64)
    case bytes([UInt8])
}

/// The fields of a protobuf message in order; numbers of fixed size come as their bytes.
func protobufFields(_ data: [UInt8]) throws -> [(Int, ProtobufValue)] {
    let damaged = SnapGenError("the tokenizer's file is damaged")
    var fields: [(Int, ProtobufValue)] = []
    var at = 0

    func varint() throws -> UInt64 {
        var value: UInt64 = 0
        var shift: UInt64 = 0
        while at < data.count, shift < 64 {
            let byte = data[at]
            at += 1
            value |= UInt64(byte & 0x7F) << shift
            if byte < 0x80 { return value }
            shift += 7
        }
        throw damaged
    }

    while at < data.count {
        let key = try varint()
        let number = Int(truncatingIfNeeded: key >> 3)
        let size: Int
        switch key & 7 {
        case 0:
            fields.append((number, .number(try varint())))
            continue
        case 1: size = 8
        case 2: size = Int(truncatingIfNeeded: try varint())
        case 5: size = 4
        default: throw damaged
        }
        guard size >= 0, size <= data.count - at else { throw damaged }
        fields.append((number, .bytes(Array(data[at..<at + size]))))
        at += size
    }
    return fields
}
