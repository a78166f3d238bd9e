// Asks a running `mlx_stream serve` one question and prints the reply while it is written.
//
//     swiftc -O ask.swift -o ask
//     ./ask 8085 starter "Why is the sky blue?"
//     ./ask ~/mlx_stream.sock starter "Why is the sky blue?"

import Foundation
import Network

func fail(_ message: String, _ status: Int32 = 1) -> Never {
    FileHandle.standardError.write(Data("ask: \(message)\n".utf8))
    exit(status)
}

/// One reply. Everything happens on the main queue.
final class Reply: @unchecked Sendable {
    private let connection: NWConnection
    private var unread = Data()

    init(to endpoint: NWEndpoint) { connection = NWConnection(to: endpoint, using: .tcp) }

    func ask(_ request: Data) {
        connection.stateUpdateHandler = { state in
            if case .waiting(let error) = state { fail("no server is there: \(error)") }
            if case .failed(let error) = state { fail("the connection failed: \(error)") }
        }
        connection.start(queue: .main)
        connection.send(content: request, completion: .contentProcessed { _ in })
        receive()
    }

    private func receive() {
        connection.receive(minimumIncompleteLength: 1, maximumLength: 65_536) { data, _, ended, error in
            self.unread.append(data ?? Data())
            while let end = self.unread.firstIndex(of: UInt8(ascii: "\n")) {
                self.read(line: self.unread[..<end])
                self.unread = Data(self.unread[(end + 1)...])
            }
            guard !ended, error == nil else {  // an answer that is not a stream has no last newline
                self.read(line: self.unread)
                fail("the server ended before its reply did")
            }
            self.receive()
        }
    }

    private func read(line: Data) {
        let text = String(decoding: line, as: UTF8.self).replacingOccurrences(of: "data: ", with: "", options: .anchored)
        if text == "[DONE]" { print(); exit(0) }
        guard text.hasPrefix("{"), let event = try? JSONSerialization.jsonObject(with: Data(text.utf8)) as? [String: Any]
        else { return }  // a header, a comment or an empty line
        if let error = event["error"] as? [String: Any] { fail(error["message"] as? String ?? text) }
        let choice = (event["choices"] as? [[String: Any]])?.first
        let delta = choice?["delta"] as? [String: Any]
        FileHandle.standardOutput.write(Data((delta?["content"] as? String ?? "").utf8))
    }
}

let words = CommandLine.arguments
guard words.count == 4 else { fail("usage: ask PORT|SOCKET MODEL QUESTION", 2) }
let port = UInt16(words[1]).flatMap(NWEndpoint.Port.init(rawValue:))
let messages = [["role": "user", "content": words[3]]]
let fields: [String: Any] = ["model": words[2], "stream": true, "messages": messages]
let body = try JSONSerialization.data(withJSONObject: fields)
// In HTTP/1.0 an answer ends with its connection, and is not cut into chunks.
let head = [
    "POST /v1/chat/completions HTTP/1.0", "Host: localhost:\(words[1])",
    "Content-Type: application/json", "Content-Length: \(body.count)",
]
let place = port.map { NWEndpoint.hostPort(host: "localhost", port: $0) } ?? NWEndpoint.unix(path: words[1])
let reply = Reply(to: place)
reply.ask(Data((head.joined(separator: "\r\n") + "\r\n\r\n").utf8) + body)
dispatchMain()
