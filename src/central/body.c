/*
 * body.c
 *		A request's body, as it comes in: collected, decompressed, limited.
 *
 * Three limits: bytes as sent, bytes after decompression, and the memory of all
 * bodies together, so that many clients cannot do what one may not.  What exceeds
 * a limit is answered only when the rest of the body has been read and thrown
 * away, for a client that is still sending does not see an answer; one that sends
 * on and on is cut off.
 *
 * A body belongs to the thread that serves its connection; the sum of memory is
 * an atomic.
 */
#include "gateway.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* zlib takes a const input only when asked to */
#define ZLIB_CONST
#include <zlib.h>

#define FIRST_SIZE			65536

/* Beyond this many bytes a body may not be larger than MAX_RATIO times what was sent. */
#define RATIO_GRACE			(8 * 1024 * 1024)
#define MAX_RATIO			200

/* A refused body is read to its end if that comes before this many times max_body. */
#define MAX_SWALLOW			4

struct Body
{
	bool		gzip;
	bool		stream_open;
	bool		stream_ended;
	z_stream	stream;
	char	   *data;
	size_t		len;
	size_t		size;
	size_t		received;		/* bytes as sent */
	int			status;			/* not 0: refused with this status */
};

static const Options *options = NULL;
static atomic_size_t memory = 0;

void
body_init(const Options *opts)
{
	options = opts;
}

Body *
body_create(bool gzip)
{
	Body	   *body = calloc(1, sizeof(Body));

	if (body != NULL)
		body->gzip = gzip;
	return body;
}

static void
drop_data(Body *body)
{
	free(body->data);
	atomic_fetch_sub(&memory, body->size);
	body->data = NULL;
	body->len = body->size = 0;
}

void
body_free(Body *body)
{
	if (body == NULL)
		return;
	drop_data(body);
	if (body->stream_open)
		inflateEnd(&body->stream);
	free(body);
}

/* Sees to room for more bytes; an error status, or 0. */
static int
reserve_room(Body *body, size_t more)
{
	size_t		size = body->size;
	char	   *data;

	while (body->len + more > size)
		size = size == 0 ? FIRST_SIZE : size * 2;
	if (size == body->size)
		return 0;
	if (atomic_fetch_add(&memory, size - body->size) + (size - body->size) > options->max_memory ||
		(data = realloc(body->data, size)) == NULL)
	{
		atomic_fetch_sub(&memory, size - body->size);
		return 503;
	}
	body->data = data;
	body->size = size;
	return 0;
}

static int
append_plain(Body *body, const char *data, size_t size)
{
	int			status = reserve_room(body, size);

	if (status == 0)
	{
		memcpy(body->data + body->len, data, size);
		body->len += size;
	}
	return status;
}

static int
append_gzip(Body *body, const char *data, size_t size)
{
	z_stream   *stream = &body->stream;

	if (!body->stream_open)
	{
		if (inflateInit2(stream, 15 + 16) != Z_OK)
			return 503;
		body->stream_open = true;
	}
	stream->next_in = (const Bytef *) data;
	stream->avail_in = (uInt) size;
	do
	{
		size_t		room = options->max_unpacked - body->len;
		int			status;
		int			result;

		if (body->stream_ended)
			return 400;			/* something behind the compressed body */
		if (room == 0 || (body->len > RATIO_GRACE && body->len / MAX_RATIO > body->received))
			return 413;
		if (room > FIRST_SIZE)
			room = FIRST_SIZE;
		if ((status = reserve_room(body, room)) != 0)
			return status;
		stream->next_out = (Bytef *) body->data + body->len;
		stream->avail_out = (uInt) room;
		result = inflate(stream, Z_NO_FLUSH);
		body->len += room - stream->avail_out;
		if (result == Z_STREAM_END)
			body->stream_ended = true;
		else if (result != Z_OK && result != Z_BUF_ERROR)
			return 400;
	} while (stream->avail_in > 0 || (stream->avail_out == 0 && !body->stream_ended));
	return 0;
}

/* The body is not wanted: it is read and thrown away. */
void
body_refuse(Body *body, int status)
{
	body->status = status;
}

/* Takes a piece; not 0: the connection is to be cut off, the client sends without end. */
int
body_take(Body *body, const char *data, size_t size)
{
	body->received += size;
	if (body->status != 0)
		return body->received > options->max_body * MAX_SWALLOW ? body->status : 0;
	if (body->received > options->max_body)
		body->status = 413;
	else
		body->status = body->gzip ? append_gzip(body, data, size) : append_plain(body, data, size);
	if (body->status != 0)
		drop_data(body);
	return 0;
}

/* All has come: 0, or the status that refuses it. */
int
body_end(Body *body)
{
	if (body->status == 0 && body->gzip && !body->stream_ended)
		body->status = 400;
	return body->status;
}

const char *
body_problem(int status)
{
	switch (status)
	{
		case 400:
			return "The body is not valid gzip.";
		case 413:
			return "The body is too large.";
		default:
			return "There is no memory for this body at the moment.";
	}
}

Parameter
body_data(const Body *body)
{
	return (Parameter) {body->data ? body->data : "", body->len};
}

size_t
body_received(const Body *body)
{
	return body ? body->received : 0;
}
