/*
 * gateway.h
 *		What the parts of the gateway share.
 */
#ifndef SM_GATEWAY_H
#define SM_GATEWAY_H

#include <stdbool.h>
#include <stddef.h>

typedef struct Options
{
	const char *host;
	const char *port;
	const char *database;		/* libpq conninfo */
	int			connections;	/* to the database */
	int			clients;		/* HTTP connections at once */
	int			clients_per_address;
	size_t		max_body;		/* bytes, as sent and after decompression */
	int			timeout;		/* seconds: one request, one statement */
	const char *tls_cert;
	const char *tls_key;
} Options;

/* An answer to be sent: a receipt, or a problem (RFC 9457). */
typedef struct Answer
{
	int			status;
	char	   *body;			/* malloc'd */
	bool		problem;
	int			retry_after;	/* seconds; 0: no such header */
} Answer;

/* problem.c */
extern Answer answer_ok(char *body);
extern Answer answer_problem(int status, const char *detail);
extern void log_line(const char *fmt,...) __attribute__((format(printf, 1, 2)));

/* pool.c */
extern bool pool_start(const Options *options);
extern void pool_stop(void);
extern Answer pool_receive(const char *body, const unsigned char token_hash[32]);
extern Answer pool_health(void);

/* server.c */
extern bool server_start(const Options *options, int *port);
extern void server_stop(int timeout);

#endif							/* SM_GATEWAY_H */
