/*
 * gateway_fuzz.c
 *		A fuzzer for what clients send to the gateway: path, method, headers,
 *		token, and a body in pieces, plain or compressed.
 *
 * A program for tests only.  server.c, body.c, signature.c and problem.c, included below, run
 * as in the gateway, but this file calls them in libmicrohttpd's place, and
 * answers in the database's.  It holds them to what they promise: one answer to
 * each request, well-formed; the database asked only with a token, and for a body
 * only after the token was admitted; bodies as sent and within the limits; no
 * memory left behind; no log line broken in two.
 */
#include <assert.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

static void check_log_line(const char *line);

/* the log goes nowhere */
#define fprintf(file, format, stamp, ms, line) check_log_line(line)
#include "problem.c"
#undef fprintf

#define memory body_memory
#define options body_options
#include "body.c"
#undef memory
#undef options

#define options signature_options
#include "signature.c"
#undef options

#include "server.c"

#define MAX_HEADERS		8
#define MAX_PIECE		64
#define MAX_BODY		2048
#define MAX_UNPACKED	4096
#define FIRST_TWO_BODIES 131072	/* body.c begins with half of it */

/* What an input is read as, piece by piece from its start. */
typedef struct Input
{
	const uint8_t *data;
	size_t		len;
} Input;

typedef struct Pair
{
	enum MHD_ValueKind kind;
	const char *name;
	char	   *value;
} Pair;

/* The request under way, in libmicrohttpd's and the database's place. */
static struct
{
	Pair		pairs[MAX_HEADERS];
	int			npairs;
	const char *sent;			/* the body, unpacked */
	size_t		sent_len;
	int			status;			/* of the answer; 0: none yet */
	bool		admitted;
	bool		denied;
	int			asked;
	uint8_t		mood;			/* of the database */
} request_now;

static const Options limits = {
	.connections = 1, .max_body = MAX_BODY, .max_unpacked = MAX_UNPACKED, .max_memory = FIRST_TWO_BODIES, .timeout = 30,
};

#define CHECK(holds) \
	do { if (!(holds)) { fprintf(stderr, "gateway_fuzz: not so: %s\n", #holds); abort(); } } while (0)

static void
check_log_line(const char *line)
{
	for (; *line != '\0'; line++)
		CHECK((unsigned char) *line >= ' ' && *line != 127);
}

/* ---------------------------------------------------------------------------
 * In libmicrohttpd's place
 * ------------------------------------------------------------------------ */

const union MHD_ConnectionInfo *
MHD_get_connection_info(struct MHD_Connection *connection, enum MHD_ConnectionInfoType type,...)
{
	(void) connection;
	(void) type;
	return NULL;
}

int
MHD_get_connection_values_n(struct MHD_Connection *connection, enum MHD_ValueKind kind, MHD_KeyValueIteratorN iterator, void *arg)
{
	int			n = 0;

	(void) connection;
	for (int i = 0; i < request_now.npairs; i++)
	{
		const Pair *pair = &request_now.pairs[i];

		if (pair->kind != kind)
			continue;
		n++;
		if (iterator(arg, kind, pair->name, strlen(pair->name), pair->value, strlen(pair->value)) != MHD_YES)
			break;
	}
	return n;
}

enum MHD_Result
MHD_queue_response(struct MHD_Connection *connection, unsigned int status, struct MHD_Response *response)
{
	(void) connection;
	(void) response;
	CHECK(request_now.status == 0);
	CHECK(status >= 200 && status <= 599);
	request_now.status = (int) status;
	return MHD_YES;
}

/* Sees every answer's body, before libmicrohttpd would own it. */
struct MHD_Response *
MHD_create_response_from_buffer(size_t size, void *buffer, enum MHD_ResponseMemoryMode mode)
{
	json_t	   *document = json_loadb(buffer, size, 0, NULL);

	CHECK(mode == MHD_RESPMEM_MUST_FREE);
	CHECK(json_is_object(document));
	json_decref(document);
	return (struct MHD_Response *) buffer;
}

enum MHD_Result
MHD_add_response_header(struct MHD_Response *response, const char *name, const char *value)
{
	(void) response;
	CHECK(strpbrk(name, "\r\n: ") == NULL && strpbrk(value, "\r\n") == NULL);
	return MHD_YES;
}

void
MHD_destroy_response(struct MHD_Response *response)
{
	free(response);
}

/* ---------------------------------------------------------------------------
 * In place of the rest of the gateway
 * ------------------------------------------------------------------------ */

Answer
pool_ask(Statement statement, const Parameter *parameters)
{
	CHECK(request_now.status == 0);
	CHECK(parameters[0].data != NULL && parameters[0].len == SM_TOKEN_HASH_LEN);
	if (statement == STATEMENT_ADMIT)
	{
		CHECK(!request_now.admitted && !request_now.denied);
		request_now.denied = (request_now.mood & 1) != 0;
		request_now.admitted = !request_now.denied;
		return request_now.denied ? answer_problem(401, "This token is not known.") : answer_ok(strdup("{}"));
	}
	CHECK(request_now.asked++ == 0);
	if (statement == STATEMENT_REFERENCE)
		CHECK(parameters[1].data == NULL || parameters[1].len <= strlen(parameters[1].data));
	else
	{
		CHECK(request_now.admitted);
		CHECK(parameters[1].len <= MAX_UNPACKED);
		CHECK(request_now.sent == NULL ||
			  (parameters[1].len == request_now.sent_len && memcmp(parameters[1].data, request_now.sent, request_now.sent_len) == 0));
	}
	if ((request_now.mood & 2) != 0)
		return answer_problem(422, request_now.npairs > 0 ? request_now.pairs[0].value : NULL);
	return answer_ok(strdup("{\"accepted\":0}"));
}

Answer
health_ask(void)
{
	return (request_now.mood & 2) != 0 ? answer_problem(503, NULL) : answer_ok(strdup("{\"status\":\"ok\"}"));
}

bool
clients_start(const Options *opts)
{
	(void) opts;
	return true;
}

void
clients_stop(void)
{
}

Client *
client_create(int fd)
{
	(void) fd;
	return NULL;
}

void
client_free(Client *client)
{
	(void) client;
}

void
client_begin(Client *client, ClientPhase phase)
{
	(void) client;
	(void) phase;
}

void
client_begin_reading(Client *client, size_t size)
{
	(void) client;
	(void) size;
}

bool
client_is_late(Client *client)
{
	(void) client;
	return false;
}

int
listen_open(const char *host, const char *port, int *bound)
{
	(void) host;
	(void) port;
	(void) bound;
	return -1;
}

/* ---------------------------------------------------------------------------
 * Inputs
 * ------------------------------------------------------------------------ */

static uint8_t
take_byte(Input *input)
{
	if (input->len == 0)
		return 0;
	input->len--;
	return *input->data++;
}

/* A line: what libmicrohttpd hands on has no zero byte and no end of line in it. */
static char *
take_line(Input *input)
{
	const uint8_t *end = input->len > 0 ? memchr(input->data, '\n', input->len) : NULL;
	size_t		len = end ? (size_t) (end - input->data) : input->len;
	char	   *line = strndup((const char *) input->data, len);

	CHECK(line != NULL);
	len += end != NULL;
	input->data += len;
	input->len -= len;
	return line;
}

static void
take_pair(Input *input)
{
	static const char *const names[] = {
		"Authorization", "content-type", "Content-Encoding", "Content-Length", "Transfer-Encoding", "Expect", "X-Reason",
	};
	static const char *const common[] = {"Bearer dG9rZW4=", "application/json", "gzip", "5", "chunked", "100-continue", "vale"};
	Pair	   *pair = &request_now.pairs[request_now.npairs++];
	uint8_t		choice = take_byte(input);
	size_t		which = choice % (sizeof(names) / sizeof(names[0]) + 1);

	pair->kind = MHD_HEADER_KIND;
	if (which == sizeof(names) / sizeof(names[0]))
	{
		pair->kind = MHD_GET_ARGUMENT_KIND;
		pair->name = "branch";
		pair->value = take_line(input);
	}
	else
	{
		pair->name = names[which];
		pair->value = choice < 0x80 ? strdup(common[which]) : take_line(input);
	}
	CHECK(pair->value != NULL);
}

/* gzip, so that more than broken streams are tried */
static char *
compress_body(const char *data, size_t len, size_t *packed_len)
{
	z_stream	stream = {0};
	size_t		size = 1024 + len;
	char	   *packed = malloc(size);

	CHECK(packed != NULL && deflateInit2(&stream, 1, Z_DEFLATED, 15 + 16, 1, Z_DEFAULT_STRATEGY) == Z_OK);
	stream.next_in = (const Bytef *) data;
	stream.avail_in = (uInt) len;
	stream.next_out = (Bytef *) packed;
	stream.avail_out = (uInt) size;
	CHECK(deflate(&stream, Z_FINISH) == Z_STREAM_END);
	*packed_len = stream.total_out;
	deflateEnd(&stream);
	return packed;
}

static bool
has_header(const char *name, const char *value)
{
	int			n = 0;
	bool		found = false;

	for (int i = 0; i < request_now.npairs; i++)
		if (request_now.pairs[i].kind == MHD_HEADER_KIND && strcasecmp(request_now.pairs[i].name, name) == 0)
		{
			n++;
			found = strcasecmp(request_now.pairs[i].value, value) == 0;
		}
	return n == 1 && found;
}

/* One request, as libmicrohttpd would hand it on; the body in exact copies of its pieces. */
static void
serve(const char *path, const char *method, const char *body, size_t len, size_t piece)
{
	void	   *state = NULL;
	size_t		size = 0;
	enum MHD_Result result = handle_request(NULL, NULL, path, method, "HTTP/1.1", NULL, &size, &state);

	while (result == MHD_YES && request_now.status == 0 && len > 0)
	{
		size_t		taken = size = len < piece ? len : piece;
		char	   *copy = malloc(size);

		CHECK(copy != NULL);
		memcpy(copy, body, size);
		result = handle_request(NULL, NULL, path, method, "HTTP/1.1", copy, &size, &state);
		free(copy);
		CHECK(result != MHD_YES || size == 0);
		body += taken;
		len -= taken;
	}
	if (result == MHD_YES && request_now.status == 0)
	{
		size = 0;
		result = handle_request(NULL, NULL, path, method, "HTTP/1.1", NULL, &size, &state);
		CHECK(result == MHD_YES && request_now.status != 0);
	}
	end_request(NULL, NULL, &state, result == MHD_YES ? MHD_REQUEST_TERMINATED_COMPLETED_OK : MHD_REQUEST_TERMINATED_WITH_ERROR);
	CHECK(state == NULL && running == 0 && atomic_load(&body_memory) == 0);
}

int
LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static const char *const methods[] = {"POST", "GET", "HEAD", "PUT", "OPTIONS"};
	static const char *const paths[] = {"/events", "/verify", "/reference/x", "/health", "/central/events", "/reconcile"};
	Input		input = {data, size};
	uint8_t		shape = take_byte(&input);
	uint8_t		first = take_byte(&input);
	size_t		piece = 1 + take_byte(&input) % MAX_PIECE * 8;
	int			npairs = take_byte(&input) % (MAX_HEADERS + 1);
	const char *method = methods[(shape >> 4) % (sizeof(methods) / sizeof(methods[0]))];
	char	   *path;
	char	   *packed = NULL;
	const char *body;
	size_t		len;

	if (options == NULL)
	{
		options = &limits;
		body_init(&limits);
	}
	memset(&request_now, 0, sizeof(request_now));
	request_now.mood = shape & 3;
	path = first < 0x80 ? strdup(paths[first % (sizeof(paths) / sizeof(paths[0]))]) : take_line(&input);
	CHECK(path != NULL);
	for (int i = 0; i < npairs; i++)
		take_pair(&input);
	body = (const char *) input.data;
	len = input.len;
	if ((shape & 4) != 0)
		body = packed = compress_body(body, len, &len);

	/* what the database must be given, where that is known */
	if (!has_header("Content-Encoding", "gzip"))
	{
		request_now.sent = body;
		request_now.sent_len = len;
	}
	else if (packed != NULL)
	{
		request_now.sent = (const char *) input.data;
		request_now.sent_len = input.len;
	}
	serve(path, method, body, len, piece);

	for (int i = 0; i < request_now.npairs; i++)
		free(request_now.pairs[i].value);
	free(packed);
	free(path);
	return 0;
}
